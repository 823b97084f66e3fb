// The mathematics that CPU and GPU share, compiled for the host and bound as it is, for
// tests/test_vmf_math.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "log_ppk.h"
#include "vmf_radial_gradient.h"

namespace py = pybind11;

namespace {

template <typename T>
py::tuple log_normalizer(py::array_t<T> concentration, int64_t dim) {
  const auto plan = nivmf::make_log_normalizer_plan<T>(dim);
  const auto value = [&](T nivmf::LogNormalizer<T>::* field) {
    return py::vectorize([&plan, field](T k) { return nivmf::log_normalizer(k, plan).*field; })(
        concentration);
  };
  using Value = nivmf::LogNormalizer<T>;
  return py::make_tuple(value(&Value::g), value(&Value::h), value(&Value::a), value(&Value::b),
                        value(&Value::slope));
}

template <typename T>
py::object radial_gradient(py::array_t<T> one_minus_w, double concentration, int64_t dim) {
  const auto plan = nivmf::make_radial_gradient_plan<T>(dim);
  const auto image = nivmf::make_radial_gradient(T(concentration), plan);
  return py::vectorize([&](T p) { return nivmf::radial_gradient(p, image, plan); })(one_minus_w);
}

template <typename T>
py::tuple box_muller(py::array_t<T> u0, py::array_t<T> u1) {
  return py::make_tuple(
      py::vectorize([](T a, T b) { return nivmf::box_muller(a, b).first; })(u0, u1),
      py::vectorize([](T a, T b) { return nivmf::box_muller(a, b).second; })(u0, u1));
}

// What Python's normaliser fixes by hand too: lifts, terms and where the other branches take over.
template <typename T>
py::tuple normalizer_plan(int64_t dim) {
  using Accuracy = nivmf::NormalizerAccuracy<T>;
  const auto plan = nivmf::make_log_normalizer_plan<T>(dim);
  return py::make_tuple(plan.lifts, plan.plain.degree / 3, double(Accuracy::kLargeConcentration),
                        double(Accuracy::kTaylorLimit));
}

template <typename T>
void bind(py::module_& m, const std::string& dtype) {
  m.def(("normalizer_plan_" + dtype).c_str(), &normalizer_plan<T>, py::arg("dim"));
  m.def(("dead_log2_" + dtype).c_str(), &nivmf::dead_log2<T, int64_t>, py::arg("n"),
        py::arg("proxies"));
  m.def("log_normalizer", &log_normalizer<T>, py::arg("concentration").noconvert(), py::arg("dim"));
  m.def("radial_gradient", &radial_gradient<T>, py::arg("one_minus_w").noconvert(),
        py::arg("concentration"), py::arg("dim"));
  m.def("box_muller", &box_muller<T>, py::arg("u0").noconvert(), py::arg("u1").noconvert());
}

py::tuple philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const nivmf::PhiloxWords out =
      nivmf::philox(key[0], key[1], {counter[0], counter[1], counter[2], counter[3]});
  return py::make_tuple(out.w0, out.w1, out.w2, out.w3);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  m.attr("max_concentration") = nivmf::kMaxConcentration;
  m.def("philox", &philox, py::arg("counter"), py::arg("key"));
  m.def("uniform", py::vectorize(&nivmf::uniform<float>));
  m.def("row_offset", &nivmf::row_offset, py::arg("sample"), py::arg("image"), py::arg("batch"),
        py::arg("dim"));
}
