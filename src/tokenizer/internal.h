/* The inside of a tokenizer, for the files of this room. */
#ifndef MEPIC_TOKENIZER_INTERNAL_H
#define MEPIC_TOKENIZER_INTERNAL_H

#include "tokenizer/bpe.h"
#include "tokenizer/vocab.h"

struct mp_tokenizer {
    mp_vocab vocab;
    mp_bpe bpe; /* unused by SentencePiece */
    char kind[32];
};

#endif
