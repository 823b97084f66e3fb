// csrc/log_ppk_kernel.cu, launchers and all, compiled for the host: tests/test_log_ppk_cuda.py
// calls it through ctypes.
#include "log_ppk_plan.h"  // first: it must compile without CUDA, real or on the host
//
#include "cuda_on_host.h"
//
#include "log_ppk_kernel.cu"

// The fields of Plan in test_log_ppk_cuda.py, with the bytes that the plan asks for.
template <typename T>
void plan(const nivmf::LogPpkSizes& s, bool has_tensor_cores, int64_t* out) {
  using namespace nivmf::ppk;
  const Plan<T> p(s, has_tensor_cores);
  Arena saved(nullptr), forward(nullptr), backward(nullptr);
  Saved<T>(p, saved);
  ForwardScratch<T>(p, true, forward);
  BackwardScratch<T>(p, true, s.N * s.B * s.D, backward);
  const int64_t fields[] = {p.tile,       p.blocks,       p.chunk,        p.back_chunk,
                            saved.size(), forward.size(), backward.size()};
  std::copy(std::begin(fields), std::end(fields), out);
}

extern "C" {

void host_seed(unsigned seed) { host::order.seed(seed); }
int64_t host_launches() { return host::launches; }
int64_t host_copies() { return host::copies; }

#define NIVMF_HOST(T, name)                                                                       \
  void plan_##name(const nivmf::LogPpkSizes* s, bool has_tensor_cores, int64_t* out) {            \
    plan<T>(*s, has_tensor_cores, out);                                                           \
  }                                                                                               \
  int64_t saved_bytes_##name(const nivmf::LogPpkSizes* s) {                                       \
    return nivmf::proxy_nca_saved_cuda<T>(*s).columns * int64_t(sizeof(T));                       \
  }                                                                                               \
  int64_t forward_bytes_##name(const nivmf::LogPpkSizes* s) {                                     \
    return nivmf::log_ppk_forward_scratch_bytes_cuda<T>(*s);                                      \
  }                                                                                               \
  int64_t backward_bytes_##name(const nivmf::LogPpkSizes* s) {                                    \
    return nivmf::log_ppk_backward_scratch_bytes_cuda<T>(*s);                                     \
  }                                                                                               \
  int proxy_nca_##name(const nivmf::LogPpkSizes* s, const nivmf::LogPpkInputs<T>* in, T* losses,  \
                       double* partial, void* saved, void* scratch) {                             \
    return nivmf::proxy_nca_cuda(*s, *in, losses, partial, saved, scratch, nullptr);              \
  }                                                                                               \
  int proxy_nca_backward_##name(const nivmf::LogPpkSizes* s, const nivmf::LogPpkInputs<T>* in,    \
                                const T* grad, const double* partial, void* saved, void* scratch, \
                                const nivmf::LogPpkGradients<T>* out) {                           \
    return nivmf::proxy_nca_backward_cuda(*s, *in, grad, partial, saved, scratch, *out, nullptr); \
  }                                                                                               \
  int log_ppk_##name(const nivmf::LogPpkSizes* s, const nivmf::LogPpkInputs<T>* in, T* out,       \
                     T* saved, double* common, void* scratch) {                                   \
    return nivmf::log_ppk_cuda(*s, *in, out, saved, common, scratch, nullptr);                    \
  }                                                                                               \
  int log_ppk_backward_##name(const nivmf::LogPpkSizes* s, const nivmf::LogPpkInputs<T>* in,      \
                              const T* grad, const T* saved, void* scratch,                       \
                              const nivmf::LogPpkGradients<T>* out) {                             \
    return nivmf::log_ppk_backward_cuda(*s, *in, grad, saved, scratch, *out, nullptr);            \
  }

NIVMF_HOST(float, f32)
NIVMF_HOST(double, f64)
}
