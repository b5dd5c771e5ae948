# embed.cmake: a file as a C array. cmake -DINPUT=file -DOUTPUT=file.c -DNAME=symbol -P embed.cmake
get_filename_component(name "${INPUT}" NAME)
file(READ "${INPUT}" hex HEX)
file(SIZE "${INPUT}" size)
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${hex}")
string(REPEAT "0x..," 16 line)
string(REGEX REPLACE "(${line})" "\\1\n" bytes "${bytes}")
file(WRITE "${OUTPUT}" "/* Made by cmake/embed.cmake from ${name}. */
#include <stddef.h>

extern const unsigned char ${NAME}[];
extern const size_t ${NAME}_len;
const unsigned char ${NAME}[] = {\n${bytes}\n};
const size_t ${NAME}_len = ${size};
")
