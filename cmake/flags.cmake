# Compiler flags of everything that is ours. No -ffast-math and no -march=native: equal inputs must give equal bits, and
# the instruction set is chosen at run time (src/backend/cpu).
add_library(mepic_flags INTERFACE)
target_compile_definitions(mepic_flags INTERFACE _GNU_SOURCE)
# Options in lists, for C alone: nvcc takes its own from cmake/cuda.cmake.
target_compile_options(mepic_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:C>:-Wall;-Wextra;-Wshadow;-Wpointer-arith;-Wstrict-prototypes;-Wmissing-prototypes;-Wvla>"
  "$<$<COMPILE_LANGUAGE:C>:-ffp-contract=off;-fno-math-errno;-fvisibility=hidden>")
# Only of the compiler this is written with (Debian 12): a newer one's new warnings stop nobody's build.
if(MEPIC_WERROR AND CMAKE_C_COMPILER_ID STREQUAL GNU AND CMAKE_C_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(mepic_flags INTERFACE "$<$<COMPILE_LANGUAGE:C>:-Werror>")
endif()
if(MEPIC_SANITIZE)
  target_compile_options(mepic_flags INTERFACE
    -fsanitize=${MEPIC_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(mepic_flags INTERFACE -fsanitize=${MEPIC_SANITIZE})
endif()
if(MEPIC_FUZZ)
  target_compile_options(mepic_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()
