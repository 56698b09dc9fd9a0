// Calls the CUDA half of the C API with what it must refuse before it asks for a device, and with good
// arguments, of which nothing is read where there is no device. Prints "name code sentence" of each.
#include <cstdint>
#include <cstdio>
#include <functional>

#include "proxytune.h"

namespace {

// Never read: the calls are refused, or there is no device.
alignas(16) char somewhere[64];

void say(const char* name, int code) {
  std::printf("%s %d %s\n", name, code, proxytune_cuda_error(code));
}

proxytune_sample_args sample_args() {
  proxytune_sample_args args{};
  args.inputs.vocab_size = 1000;
  args.inputs.base.data = somewhere;
  args.token_ids = reinterpret_cast<int64_t*>(somewhere);
  return args;
}

proxytune_verify_args verify_args() {
  proxytune_verify_args args{};
  args.inputs = sample_args().inputs;
  args.num_drafts = 2;
  args.draft_token_ids = reinterpret_cast<const int64_t*>(somewhere);
  args.token_ids = reinterpret_cast<int64_t*>(somewhere);
  args.num_accepted = reinterpret_cast<int32_t*>(somewhere);
  return args;
}

void sample(const char* name, const std::function<void(proxytune_sample_args&)>& change,
            int64_t rows = 1) {
  proxytune_sample_args args = sample_args();
  change(args);
  say(name, proxytune_cuda_sample(&args, rows, nullptr));
}

void verify(const char* name, const std::function<void(proxytune_verify_args&)>& change,
            int64_t rows = 1, void* workspace = somewhere, size_t size = sizeof(somewhere)) {
  proxytune_verify_args args = verify_args();
  change(args);
  say(name, proxytune_cuda_verify(&args, rows, workspace, size, nullptr));
}

}  // namespace

int main() {
  say("null", proxytune_cuda_sample(nullptr, 1, nullptr));
  sample("vocab-size", [](auto& a) { a.inputs.vocab_size = (1 << 19) + 1; });
  sample("base", [](auto& a) { a.inputs.base.data = nullptr; });
  sample("pair", [](auto& a) { a.inputs.expert.data = somewhere; });
  sample("dtype", [](auto& a) { a.inputs.base.dtype = 3; });
  sample("stream", [](auto& a) { a.noise_stream = 5; });
  sample("num-top", [](auto& a) { a.num_top = 129; });
  sample("attribution", [](auto& a) { a.attribution = reinterpret_cast<float*>(a.token_ids); });
  sample("token-ids", [](auto& a) { a.token_ids = nullptr; });
  sample("negative-rows", [](auto&) {}, -1);
  sample("too-many-rows", [](auto&) {}, int64_t(1) << 27);
  verify("verify-null-workspace", [](auto&) {}, 1, nullptr);
  verify("verify-small-workspace", [](auto&) {}, 1, somewhere, proxytune_cuda_workspace_size(1, 2) - 1);
  verify("verify-unaligned-workspace", [](auto&) {}, 1, somewhere + 2);
  verify("mode", [](auto& a) { a.mode = 2; });
  verify("draft-logits", [](auto& a) { a.mode = PROXYTUNE_VERIFY_REJECTION; });
  verify("drafts", [](auto& a) { a.draft_token_ids = nullptr; });
  verify("too-many-positions", [](auto&) {}, int64_t(1) << 26);
  say("no-result", proxytune_cuda_supported(0, 0, nullptr));
  say("unknown-code", 99);
  for (const int code : {PROXYTUNE_ERROR_DEVICE, PROXYTUNE_ERROR_SHAPE}) say("sentence", code);
  for (const auto& [rows, drafts] :
       {std::pair<int64_t, int64_t>{3, 4}, {1, 0}, {-1, 0}, {1, -1}, {1 << 26, 2}}) {
    std::printf("workspace %zu\n", proxytune_cuda_workspace_size(rows, drafts));
  }
  int64_t widest = -1;
  const int code = proxytune_cuda_supported(0, 0, &widest);
  std::printf("supported %d %lld %s\n", code, static_cast<long long>(widest),
              proxytune_cuda_error(code));
  if (code != PROXYTUNE_OK) {
    sample("good", [](auto&) {});
    verify("good", [](auto&) {});
  }
}
