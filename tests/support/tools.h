/* A tiny model whose chat template has tools, for the tests of what the server does with them. */
#ifndef MEPIC_TESTS_SUPPORT_TOOLS_H
#define MEPIC_TESTS_SUPPORT_TOOLS_H

#include "support/replies.h"
#include "support/server.h"
#include "support/tiny.h"
#include "support/tools_template.h"

static inline mepic_engine_options tools_options(void) {
    static const char *path;
    if (!path) {
        mp_synth_spec spec = mp_synth_tiny(MP_ARCH_LLAMA);
        spec.chat_template = tools_template;
        path = tiny_model_write(&spec);
    }
    mepic_engine_options options = tiny_options();
    options.model_path = path;
    options.context = 2048;
    options.pages = 1024;
    return options;
}

/* A fixture like setup of support/server.h. */
static inline int setup_tools(void **state) {
    (void)state;
    const mepic_engine_options options = tools_options();
    engine = open_engine(&options);
    const mp_server_options serve = default_options();
    start(&serve);
    return 0;
}

#endif
