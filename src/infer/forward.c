/* One transformer block is nine backend calls; what differs between architectures is decided behind them. */
#include "infer/forward.h"

static void layer_forward(mp_backend *backend, uint32_t layer) {
    const mp_backend_ops *ops = backend->ops;
    ops->norm(backend, MP_NORM_ATTN, layer);
    ops->project(backend, MP_PROJ_QKV, layer);
    ops->store(backend, layer);
    ops->attend(backend, layer);
    ops->project(backend, MP_PROJ_OUT, layer);
    ops->norm(backend, MP_NORM_FFN, layer);
    ops->project(backend, MP_PROJ_GATE_UP, layer);
    ops->activate(backend);
    ops->project(backend, MP_PROJ_DOWN, layer);
}

mepic_status mp_forward_prepare(mp_backend *backend, const mp_model *model, mepic_error *err) {
    const mp_backend_ops *ops = backend->ops;
    mepic_status status = MEPIC_OK;
    for (uint32_t i = 0; status == MEPIC_OK && ops->record && ops->record(backend, i); i++) {
        ops->embed(backend);
        for (uint32_t layer = 0; layer < model->hp.n_layers; layer++) layer_forward(backend, layer);
        ops->logits(backend);
        status = ops->recorded(backend, err);
    }
    return status;
}

mepic_status mp_forward(mp_backend *backend, const mp_model *model, const mp_step *step, uint32_t first, uint32_t last,
                        mepic_error *err) {
    const mp_backend_ops *ops = backend->ops;
    if (first == 0) {
        ops->step_begin(backend, step);
        ops->embed(backend);
    }
    for (uint32_t layer = first; layer < last; layer++) layer_forward(backend, layer);
    if (last < model->hp.n_layers) return MEPIC_OK;
    if (step->n_logits > 0) ops->logits(backend);
    return ops->step_end(backend, err);
}
