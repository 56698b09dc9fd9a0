// Registers the CUDA C++ kernels with torch, on the current stream of the logits' device.
//
// The stream comes from a function that CPU builds of torch lack: there the module is built and
// linked, and loading it fails.
#include <Python.h>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"

namespace {

using namespace ptk::binding;

void check_code(int code) {
  STD_TORCH_CHECK(code == PROXYTUNE_OK, "proxytune: ", proxytune_cuda_error(code));
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "proxytune: no current stream");
  return static_cast<cudaStream_t>(stream);
}

void check_device(const Tensor& base, const Tensor& other) {
  STD_TORCH_CHECK(other.is_cuda() && other.get_device_index() == base.get_device_index(),
                  "proxytune: all tensors must be on the device of base");
}
void check_device(const Tensor& base, const MaybeTensor& other) {
  if (other) check_device(base, *other);
}

struct Cuda {
  // The dispatcher comes here where any tensor is on a CUDA device.
  template <typename... Others>
  static void check_devices(const Tensor& base, const Others&... others) {
    check_device(base, base);
    (check_device(base, others), ...);
  }

  static void sample(const proxytune_sample_args& args, const Tensor& base) {
    STD_TORCH_CHECK(!args.attributed, "proxytune: attributed has no kernel in CUDA C++, Triton has one");
    const int64_t rows = base.size(0);
    if (rows == 0) return;  // an empty tensor's pointer is null, which the C API refuses
    const int32_t device = base.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_code(proxytune_cuda_sample(&args, rows, current_stream(device)));
  }

  // The workspace is this call's alone: calls on other streams, and replays of a graph that holds
  // this one, may overlap with the next.
  static void verify(const proxytune_verify_args& args, const Tensor& base) {
    const int64_t rows = base.size(0);
    if (rows == 0) return;
    const int32_t device = base.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    const size_t bytes = proxytune_cuda_workspace_size(rows, args.num_drafts);
    const Tensor workspace = new_tensor(base, ScalarType::Int, int64_t(bytes / sizeof(int32_t)));
    const auto error = cudaMemsetAsync(workspace.data_ptr(), 0, rows * sizeof(int32_t), stream);
    check_code(error == cudaSuccess ? PROXYTUNE_OK : PROXYTUNE_ERROR_CUDA + int(error));
    check_code(proxytune_cuda_verify(&args, rows, workspace.data_ptr(), bytes, stream));
  }
};

PyObject* max_vocab_size(PyObject*, PyObject* args) {
  int rejection = 0, device = 0;
  if (!PyArg_ParseTuple(args, "pi", &rejection, &device)) return nullptr;
  int64_t result = 0;
  const int code = proxytune_cuda_supported(device, rejection, &result);
  if (code == PROXYTUNE_OK) return PyLong_FromLongLong(result);
  PyErr_SetString(PyExc_RuntimeError, proxytune_cuda_error(code));
  return nullptr;
}

PyMethodDef methods[] = {
    {"max_vocab_size", max_vocab_size, METH_VARARGS,
     "Widest rows that a device can hold, by (rejection, device); why it can hold none."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", "CUDA C++ kernels.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(proxytune_cuda, CUDA, m) { Operators<Cuda>::implement(m); }

PyMODINIT_FUNC PyInit__cuda(void) { return PyModule_Create(&module); }
