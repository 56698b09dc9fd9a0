// Fibers: threads that give way only where they ask to. On x86-64 a switch is fourteen instructions
// (ucontext's makes a system call); elsewhere, and with PTK_UCONTEXT, ucontext does it.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(PTK_UCONTEXT)
#define PTK_UCONTEXT
#endif

namespace ptk {
namespace model {

#if !defined(PTK_UCONTEXT)
// Pushes what a callee keeps, leaves the stack pointer in *from, and goes on where `to` left off.
extern "C" void ptk_switch_stack(void** from, void* to);
asm(R"(
.text
.local ptk_switch_stack
.type ptk_switch_stack, @function
ptk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ptk_switch_stack, .-ptk_switch_stack
)");
#endif

// Where a fiber, or the thread that runs them all, left off.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The first switch to here calls entry(), which must never return, on this stack.
  void prepare(std::byte* stack, size_t bytes, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // of a fiber that was left in the middle
    stack_ = stack;
    bytes_ = bytes;
#endif
#if defined(PTK_UCONTEXT)
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = bytes;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#else
    constexpr int kKept = 6;  // registers that a switch pops before it returns, into entry
    auto** top = reinterpret_cast<void**>(stack + bytes) - (kKept + 4);
    for (int i = 0; i < kKept; ++i) top[i] = nullptr;
    top[kKept] = reinterpret_cast<void*>(entry);
    top[kKept + 1] = nullptr;  // entry's return address; the stack is then 8 past a multiple of 16
    at_ = top;
#endif
  }

  // Stores this context and goes on in the other one; returns when something switches back.
  void switch_to(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* frames = nullptr;
    __sanitizer_start_switch_fiber(&frames, other.stack_, other.bytes_);
#endif
#if defined(PTK_UCONTEXT)
    swapcontext(&at_, &other.at_);
#else
    ptk_switch_stack(&at_, other.at_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  }

  // The first thing on a new stack; `from` is where the switch came from.
  static void arrived([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.stack_, &from.bytes_);
#endif
  }

 private:
#if defined(PTK_UCONTEXT)
  ucontext_t at_{};
#else
  void* at_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* stack_ = nullptr;
  size_t bytes_ = 0;
#endif
};

// Stacks with a page below each that can't be touched.
class Stacks {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 256 << 10;
#else
  static constexpr size_t kBytes = 32 << 10;
#endif

  explicit Stacks(int count) : page_(size_t(sysconf(_SC_PAGESIZE))), bytes_(size_t(count) * step()) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("cluster model: stacks");
      std::abort();
    }
    memory_ = static_cast<std::byte*>(memory);
    for (int i = 0; i < count; ++i) mprotect(memory_ + size_t(i) * step(), page_, PROT_NONE);
  }
  ~Stacks() {
#if defined(__SANITIZE_ADDRESS__)
    // Fibers that never returned leave their frames marked, for whoever has these addresses next.
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_);
#endif
    munmap(memory_, bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  std::byte* at(int i) const { return memory_ + size_t(i) * step() + page_; }
  // Not all of the same size: their ends, where the work is, would share a few sets of the cache.
  static size_t bytes(int i) { return kBytes - size_t(i % 61) * 64; }

 private:
  size_t step() const { return kBytes + page_; }
  size_t page_, bytes_;
  std::byte* memory_;
};

}  // namespace model
}  // namespace ptk
