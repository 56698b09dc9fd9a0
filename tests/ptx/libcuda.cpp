// A libcuda.so.1 that launches nothing: it notes what Triton's launcher (driver.c) made of a call.

#include <stdint.h>
#include <string.h>

namespace {

struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned num_attributes;
};

constexpr int MOST = 256;

struct Noted {  // as launcher.py has it
  unsigned grid[3], block[3], shared, num_attributes;
  uint64_t stream;
  int64_t launches;
  uint64_t parameters[MOST];
} noted;

int sizes[MOST], num_sizes;

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ANSWERS(name, parameters, ...) \
  EXPORT int name parameters {         \
    __VA_ARGS__;                       \
    return 0;                          \
  }

ANSWERS(cuInit, (unsigned))
ANSWERS(cuDriverGetVersion, (int* v), *v = 13000)
ANSWERS(cuCtxGetCurrent, (void** c), *c = (void*)1)
ANSWERS(cuCtxSetCurrent, (void*))
ANSWERS(cuCtxSetLimit, (int, size_t))
ANSWERS(cuCtxGetLimit, (size_t * v, int), *v = 0)
ANSWERS(cuDevicePrimaryCtxRetain, (void** c, int), *c = (void*)1)
ANSWERS(cuDeviceGet, (int* d, int ordinal), *d = ordinal)
ANSWERS(cuDeviceGetCount, (int* n), *n = 1)
ANSWERS(cuGetErrorString, (int, const char** s), *s = "an error of no device")
ANSWERS(cuGetErrorName, (int, const char** s), *s = "no device")
ANSWERS(cuModuleLoadData, (void** m, const void*), *m = (void*)2)
ANSWERS(cuModuleGetFunction, (void** f, void*, const char*), *f = (void*)3)
ANSWERS(cuModuleUnload, (void*))
ANSWERS(cuFuncGetAttribute, (int* v, int attribute, void*), *v = attribute == 0 ? 1024 : 0)
ANSWERS(cuFuncSetAttribute, (void*, int, int))
ANSWERS(cuFuncSetCacheConfig, (void*, int))
ANSWERS(cuPointerGetAttribute, (void* d, int, uint64_t p), *(uint64_t*)d = p)
ANSWERS(cuOccupancyMaxActiveClusters, (int* n, void*, void*), *n = 1)
ANSWERS(cuTensorMapEncodeTiled, ())
ANSWERS(cuTensorMapEncodeIm2col, ())

// An H100's, by CUdevice_attribute.
EXPORT int cuDeviceGetAttribute(int* v, int attribute, int) {
  switch (attribute) {
    case 1: *v = 1024; break;       // threads a block
    case 10: *v = 32; break;        // lanes
    case 12: *v = 65536; break;     // registers a block
    case 13: *v = 1980000; break;   // kHz
    case 16: *v = 132; break;       // multiprocessors
    case 36: *v = 2600000; break;   // kHz of memory
    case 37: *v = 5120; break;      // bits of its bus
    case 81: *v = 233472; break;    // shared memory a multiprocessor
    case 97: *v = 232448; break;    // shared memory a block that asks
    default: *v = 1;
  }
  return 0;
}

EXPORT int cuLaunchKernelEx(const Config* c, void*, void** parameters, void**) {
  memcpy(noted.grid, c->grid, sizeof noted.grid);
  memcpy(noted.block, c->block, sizeof noted.block);
  noted.shared = c->shared;
  noted.num_attributes = c->num_attributes;
  noted.stream = (uint64_t)c->stream;
  noted.launches++;
  for (int i = 0; i < num_sizes; i++) {
    noted.parameters[i] = 0;
    memcpy(&noted.parameters[i], parameters[i], sizes[i]);
  }
  return 0;
}

EXPORT int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void* stream, void** parameters,
                          void** extra) {
  const Config c{{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0};
  return cuLaunchKernelEx(&c, f, parameters, extra);
}

// Bytes of the parameters of the launches that follow.
EXPORT void expect(const int* bytes, int n) {
  memcpy(sizes, bytes, n * sizeof(int));
  num_sizes = n;
}

EXPORT const void* last_launch() { return &noted; }
