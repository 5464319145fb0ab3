// A CUDA driver with no device behind it, for the host's half of a launch: Triton's own launcher runs as on a GPU,
// and what it passes is checked as far as a driver would check it. See stub_cuda.py.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define OK CUDA_SUCCESS
#define REFUSE(...)                                                                                                    \
  do {                                                                                                                 \
    snprintf(why, sizeof why, __VA_ARGS__);                                                                            \
    return CUDA_ERROR_INVALID_VALUE;                                                                                   \
  } while (0)

static char why[256] = "refused by the stub";
static CUcontext current = (CUcontext)1;
static long launched, described;

long stub_launches(void) { return launched; }
long stub_descriptors(void) { return described; }

static int capability(void) {
  const char *text = getenv("STUB_CUDA_CAPABILITY");
  return text ? atoi(text) : 90;
}

static int shared_memory(void) {
  int c = capability();
  return 1024 * (c == 80 ? 163 : c == 90 || c == 100 ? 227 : 99);
}

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = why, OK; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, OK; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, OK; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, OK; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return OK; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, OK; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = current, OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)2, OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule m, const char *n) { return *function = (CUfunction)3, OK; }
CUresult cuModuleUnload(CUmodule module) { return OK; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return OK; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, OK;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, OK;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, OK;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability() / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability() % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_memory(); break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  default: *value = 1;
  }
  return OK;
}

// The rules of the CUDA driver's documentation for tiled descriptors, as far as lowbit's could break them.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                                const cuuint32_t *step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widest[] = {256 * 16, 32, 64, 128}; // of a box's row, by swizzle
  described++;
  if ((unsigned)type > 12 || rank < 1 || rank > 5) REFUSE("descriptor: type %u, rank %u", type, rank);
  if ((size_t)map % 64 || (size_t)address % 16) REFUSE("descriptor: at %p, of %p", (void *)map, address);
  for (unsigned i = 0; i < rank; i++) {
    if (!size[i] || size[i] > 1ull << 32) REFUSE("descriptor: size %llu", (unsigned long long)size[i]);
    if (!box[i] || box[i] > 256) REFUSE("descriptor: box %u", box[i]);
    if (step[i] < 1 || step[i] > 8) REFUSE("descriptor: element stride %u", step[i]);
    if (i + 1 < rank && (stride[i] % 16 || stride[i] >= 1ull << 40 || (!i && stride[0] < size[0] * bytes[type])))
      REFUSE("descriptor: stride %llu", (unsigned long long)stride[i]);
  }
  if (box[0] * bytes[type] % 16 || (swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && box[0] * bytes[type] > widest[swizzle]))
    REFUSE("descriptor: a box row of %u bytes, swizzle %u", box[0] * bytes[type], swizzle);
  memset(map, 0, sizeof *map);
  return OK;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  launched++;
  if (config->gridDimX < 1 || config->gridDimX > 2147483647u || config->gridDimY > 65535 || config->gridDimZ > 65535)
    REFUSE("launch: grid %u × %u × %u", config->gridDimX, config->gridDimY, config->gridDimZ);
  if (config->blockDimX > 1024 || (int)config->sharedMemBytes > shared_memory())
    REFUSE("launch: %u threads, %u bytes", config->blockDimX, config->sharedMemBytes);
  return OK;
}
