// One launch that shows whether the kernels of this library run on a device: whether it holds code for it, and whether
// the driver takes that code.
#include <cuda_runtime.h>

namespace {
__global__ void probe_kernel() {}
}  // namespace

// Called by gcahng/native.py through ctypes, on the current device: CUDA's number of an error and what it says, or 0.
extern "C" __attribute__((visibility("default"))) int gcahng_cuda_probe(const char** said) {
  probe_kernel<<<1, 1, 0, cudaStreamPerThread>>>();
  cudaError_t error = cudaGetLastError();
  const cudaError_t finished = cudaStreamSynchronize(cudaStreamPerThread);
  if (error == cudaSuccess) error = finished;
  *said = cudaGetErrorString(error);
  cudaGetLastError();  // or this library, which has a CUDA runtime of its own, would find it behind its next launch
  return error;
}
