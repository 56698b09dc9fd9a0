// What -fsanitize=thread makes of each access to memory, without the library that belongs to it: every
// byte of shared memory knows who wrote it, read it and updated it last, and an access that no barrier
// parts from one that it conflicts with ends the run. So does a message that comes where its sender has not
// acquired what the block had released after such an access, and a read of one by who has not awaited and
// acquired it. Exact, as these are all that orders threads here; reads of what nothing wrote, and of blocks
// that are gone, end it too.
//
// Compiled without -fsanitize=thread, and linked with code compiled with it.
#include <dlfcn.h>

#include "cluster.h"

namespace ptk {
namespace model {
namespace {

enum Level { kThread, kWarp, kBlock, kMessage };
enum class Access { kRead, kWrite, kUpdate };

bool inside = false;  // what is called from here may be instrumented

class Checker {
 public:
  Checker(Cluster& cluster, void* from)
      : cluster_(cluster), me_(cluster.running()), from_(from),
        thread_(uint16_t(me_.block * cluster.threads() + me_.thread)) {}

  // One access, to `bytes` of memory from number `first` on.
  void touch(Access access, std::vector<Trace>& traces, size_t first, size_t bytes) {
    bool written = access == Access::kWrite;
    for (byte_ = first; byte_ < first + bytes; ++byte_) {
      touch(access, traces[byte_]);
      written = written || traces[byte_].written.time >= cluster_.started();
    }
    byte_ = first;
    // Of some of its bytes: a structure is copied with what pads it.
    if (!written) fail(access, "that nothing has written", {});
  }

 private:
  void touch(Access access, Trace& trace) const {
    if (!ordered(trace.written)) fail(access, "with no barrier after %s wrote it", trace.written);
    if (access != Access::kRead && !ordered(trace.read)) fail(access, "with no barrier after %s read it", trace.read);
    if (access != Access::kUpdate && !ordered(trace.updated)) fail(access, "with no barrier after %s updated it", trace.updated);
    note(access == Access::kRead ? trace.read : access == Access::kWrite ? trace.written : trace.updated);
  }

  Level level(uint16_t other) const {
    if (other == thread_) return kThread;
    if (other / kLanes == thread_ / kLanes) return kWarp;
    return kBlock;
  }

  // Whether a barrier that all who may have made the touch passed, and this thread, came after it.
  bool ordered(const Touch& touch) const {
    if (touch.time < cluster_.started()) return true;
    if (touch.level == kMessage) return me_.acquired[touch.box] > touch.phase;
    const int least = std::max(int(touch.level), int(level(touch.thread)));
    if (least == kThread) return true;
    int64_t last = -1;
    if (least <= kBlock) last = cluster_.passed(me_.block);
    if (least <= kWarp) last = std::max(last, cluster_.passed(me_.block, me_.thread));
    return last > touch.time;
  }

  // Touches that no barrier parts are kept as one, of the smallest group that all who made them are in.
  void note(Touch& touch) const {
    const int wide = ordered(touch) ? kThread : std::max(int(touch.level), int(level(touch.thread)));
    touch = {cluster_.now(), 0, thread_, 0, uint8_t(wide)};
  }

  [[noreturn]] void fail(Access access, const char* how, const Touch& touch) const {
    inside = false;
    Dl_info library{};
    dladdr(from_, &library);
    const auto offset = static_cast<char*>(from_) - static_cast<char*>(library.dli_fbase) - 1;
    const int block = touch.thread / cluster_.threads(), thread = touch.thread % cluster_.threads();
    std::string who = "thread " + std::to_string(thread) + " of block " + std::to_string(block);
    if (touch.level == kMessage) who += ", by a message,";
    else if (touch.level != kThread) who += " or one near it";
    char what[200];
    std::snprintf(what, sizeof what, how, who.c_str());
    const char* does = access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "updates";
    cluster_.fail("race: thread %d of block %d %s byte %zu of block %zu's shared memory %s "
                  "(addr2line -Cife %s 0x%tx)",
                  me_.thread, me_.block, does, byte_ % cluster_.shared_bytes(),
                  byte_ / cluster_.shared_bytes(), what, library.dli_fname, offset);
  }

  Cluster& cluster_;
  const Fiber& me_;
  void* from_;
  const uint16_t thread_;
  size_t byte_ = 0;
};

std::vector<Trace>& traces_of(Cluster& cluster) {
  std::vector<Trace>& traces = cluster.traces();
  if (traces.empty()) traces.resize(size_t(cluster.blocks()) * cluster.shared_bytes());
  return traces;
}

void check(const volatile void* address, size_t bytes, Access access, void* from) {
  if (inside || !running_cluster) return;
  Cluster& cluster = *running_cluster;
  const std::byte* arena = cluster.shared(0) - Cluster::kGuard;
  const ptrdiff_t offset = static_cast<const volatile std::byte*>(address) - arena;
  const size_t block = size_t(offset) / cluster.step();
  if (offset < 0 || block >= size_t(cluster.blocks())) return;
  inside = true;
  const ptrdiff_t first = offset % ptrdiff_t(cluster.step()) - ptrdiff_t(Cluster::kGuard);
  const size_t size = cluster.shared_bytes();
  if (first < 0 || size_t(first) + bytes > size) {
    inside = false;
    cluster.fail("byte %td of block %zu's %zu bytes of shared memory", first, block, size);
  }
  if (cluster.gone(int(block))) {
    inside = false;
    cluster.fail("block %zu's shared memory, but that block has returned", block);
  }
  if (block != size_t(cluster.running().block)) {
    inside = false;
    cluster.fail("block %zu's shared memory, by block %d, which may only send to it", block, cluster.running().block);
  }
  Checker(cluster, from).touch(access, traces_of(cluster), block * size + size_t(first), bytes);
  inside = false;
}

}  // namespace

void check_message(Cluster& cluster, const Message& message, int phase) {
  const Fiber& from = *message.from;
  const uint16_t thread = uint16_t(from.block * cluster.threads() + from.thread);
  const size_t first = size_t(message.to) * cluster.shared_bytes() + message.offset;
  for (size_t byte = first; byte < first + sizeof message.value; ++byte) {
    Trace& trace = traces_of(cluster)[byte];
    for (const Touch* touch : {&trace.written, &trace.read, &trace.updated}) {
      if (touch->time >= cluster.started() && touch->time >= message.time) {
        cluster.fail("race: a message of thread %d of block %d replaces byte %zu of block %d's shared memory with no "
                     "release and acquire after thread %d %s it",
                     from.thread, from.block, message.offset + (byte - first), message.to,
                     touch->thread % cluster.threads(), touch == &trace.read ? "read" : "wrote");
      }
    }
    trace.written = {cluster.now(), phase, thread, uint8_t(message.box), kMessage};
  }
}

}  // namespace model
}  // namespace ptk

using ptk::model::Access;
using ptk::model::check;

// gcc's names for what it calls: gcc/sanitizer.def.
extern "C" {

#define PTK_SIZE(n)                                                                                   \
  void __tsan_read##n(void* p) { check(p, n, Access::kRead, __builtin_return_address(0)); }            \
  void __tsan_write##n(void* p) { check(p, n, Access::kWrite, __builtin_return_address(0)); }
PTK_SIZE(1) PTK_SIZE(2) PTK_SIZE(4) PTK_SIZE(8) PTK_SIZE(16)
#undef PTK_SIZE

#define PTK_SIZE(n)                                                                                   \
  void __tsan_unaligned_read##n(void* p) { check(p, n, Access::kRead, __builtin_return_address(0)); }  \
  void __tsan_unaligned_write##n(void* p) { check(p, n, Access::kWrite, __builtin_return_address(0)); }
PTK_SIZE(2) PTK_SIZE(4) PTK_SIZE(8) PTK_SIZE(16)
#undef PTK_SIZE

void __tsan_read_range(void* p, size_t n) { check(p, n, Access::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { check(p, n, Access::kWrite, __builtin_return_address(0)); }

uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t value, int) {
  check(p, sizeof *p, Access::kUpdate, __builtin_return_address(0));
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}

uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int) {
  check(p, sizeof *p, Access::kUpdate, __builtin_return_address(0));
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
void __tsan_atomic32_store(volatile uint32_t* p, uint32_t value, int) {
  check(p, sizeof *p, Access::kUpdate, __builtin_return_address(0));
  __atomic_store_n(p, value, __ATOMIC_SEQ_CST);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
}
