/* Round-to-nearest encoders for every supported block format, for synthetic models and tests. They choose scales from
 * the range of a block and search for nothing better. Pure; any thread. */
#ifndef MEPIC_TOOLS_QUANTIZE_H
#define MEPIC_TOOLS_QUANTIZE_H

#include "model/dtype.h"

/* src: [n], n a multiple of the block length, values finite; dst: n / len * bytes of mp_dtype_find(type). */
void mp_quantize(mp_dtype type, const float *src, void *dst, size_t n);

#endif
