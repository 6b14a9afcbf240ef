// One launch that shows whether the kernels of this library run on a device: whether it holds code for it, and whether
// the driver takes that code.
#include <cuda_runtime.h>

namespace {
__global__ void probe_kernel() {}
}  // namespace

// Called by gcahng/native.py through ctypes: CUDA's number of an error and what it says, or 0. The current device
// stays.
extern "C" __attribute__((visibility("default"))) int gcahng_cuda_probe(int device, const char** said) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    probe_kernel<<<1, 1, 0, cudaStreamPerThread>>>();
    error = cudaGetLastError();
    const cudaError_t finished = cudaStreamSynchronize(cudaStreamPerThread);
    if (error == cudaSuccess) error = finished;
    cudaSetDevice(before);
  }
  *said = cudaGetErrorString(error);
  cudaGetLastError();  // or torch would find it behind its own next launch
  return error;
}
