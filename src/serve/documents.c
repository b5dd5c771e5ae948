#include "serve/documents.h"

#include <stdio.h>

void mp_document_label(uint32_t index, char out[MP_DOCUMENT_LABEL_CAP]) {
    snprintf(out, MP_DOCUMENT_LABEL_CAP, "%sDocument %u:\n", index ? "\n\n" : "", index + 1);
}

const char *mp_question_opening(bool first, bool plain) {
    return first || plain ? "\n\nQuestion: " : "Question: ";
}

const char *mp_question_ending(bool plain) {
    return plain ? "\nAnswer:" : "";
}
