# The CUDA backend: found, or cleanly absent. No GPU is needed to build. Sets MEPIC_HAS_CUDA and mepic_cuda_flags.
#
# A C program links the library with plain cc: no exceptions, RTTI or guarded statics in the host code of .cu files, so
# nothing of libstdc++ is needed, and the CUDA runtime is linked statically. cuBLASLt stays a shared library.
set(MEPIC_HAS_CUDA FALSE)
if(NOT MEPIC_CUDA STREQUAL "OFF" AND NOT MEPIC_SANITIZE AND NOT MEPIC_FUZZ)
  include(CheckLanguage)
  # Both before the language is enabled: CMake would take an architecture of its own, and look for a compiler elsewhere.
  set(CMAKE_CUDA_ARCHITECTURES ${MEPIC_CUDA_ARCHITECTURES})
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(CMAKE_CUDA_COMPILER nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda/bin)
  endif()
  if(CMAKE_CUDA_COMPILER)
    find_program(MEPIC_CUDA_HOST NAMES c++ g++)
  endif()
  if(CMAKE_CUDA_COMPILER AND MEPIC_CUDA_HOST)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(MEPIC_HAS_CUDA TRUE)
  elseif(MEPIC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MEPIC_CUDA is ON, but nvcc or a C++ compiler for its host code was not found; "
                        "put nvcc on the PATH or set CMAKE_CUDA_COMPILER")
  endif()
endif()
message(STATUS "CUDA backend: ${MEPIC_HAS_CUDA}")

if(MEPIC_HAS_CUDA)
  set(MEPIC_CUDA_PC_LIBS " -L${CUDAToolkit_LIBRARY_DIR} -lcublasLt -lcudart_static -lrt -ldl")
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  add_library(mepic_cuda_flags INTERFACE)
  target_compile_options(mepic_cuda_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;-Xcompiler=-Wall,-Wextra,-fvisibility=hidden>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fno-exceptions,-fno-rtti,-fno-threadsafe-statics>")
  if(MEPIC_WERROR)
    target_compile_options(mepic_cuda_flags INTERFACE "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>")
  endif()
endif()
