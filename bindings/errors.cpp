// TypeError for a wrong dtype, NotImplementedError for what was not built. Python's symbols are weak: the library also
// loads where there is no Python.
#include <pybind11/pybind11.h>

#pragma weak PyExc_NotImplementedError
#pragma weak PyExc_TypeError
#pragma weak PyErr_SetString

#include "engine.h"

namespace llamakern {

void throw_type_error(const std::string& message) { throw pybind11::type_error(message); }

namespace {
struct NotBuilt : pybind11::builtin_exception {
  using builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_NotImplementedError, what()); }
};
}  // namespace

void throw_not_built(const std::string& message) { throw NotBuilt(message); }

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

}  // namespace llamakern
