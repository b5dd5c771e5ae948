#include "serve/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "serve/json.h"

#undef mp_refuse
bool mp_refuse(mp_api_error *err, uint32_t status, const char *code, const char *param, const char *format, ...) {
    *err = (mp_api_error){ .status = status, .code = code };
    snprintf(err->param, sizeof err->param, "%s", param ? param : "");
    mp_end_at_character(err->param, sizeof err->param);
    va_list args;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    mp_end_at_character(err->message, sizeof err->message);
    if (status == 429 || status == 503) err->retry_after = 1;
    return false;
}

bool mp_refuse_memory(mp_api_error *err, const char *what) {
    return mp_refuse(err, 503, "out_of_memory", NULL, "out of memory for %s", what);
}

bool mp_refuse_engine(mp_api_error *err, const mepic_error *engine_error) {
    static const struct {
        mepic_status status;
        uint32_t http;
        const char *code;
    } map[] = {
        { MEPIC_ERR_ARGUMENT, 400, "invalid_value" },  { MEPIC_ERR_FORMAT, 400, "invalid_value" },
        { MEPIC_ERR_UNSUPPORTED, 400, "unsupported" }, { MEPIC_ERR_TOO_LONG, 400, "context_length_exceeded" },
        { MEPIC_ERR_BUSY, 503, "overloaded" },         { MEPIC_ERR_NOMEM, 503, "out_of_memory" },
    };
    for (size_t i = 0; i < sizeof map / sizeof *map; i++) {
        if (map[i].status == engine_error->status) {
            return mp_refuse(err, map[i].http, map[i].code, NULL, "%s", engine_error->message);
        }
    }
    return mp_refuse(err, 500, "engine_failed", NULL, "%s", engine_error->message);
}

const char *mp_api_error_type(uint32_t status) {
    switch (status) {
    case 401: return "authentication_error";
    case 403: return "permission_error";
    case 404: return "not_found_error";
    case 429: return "rate_limit_error";
    case 503: return "overloaded_error";
    default: return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

bool mp_openai_error_write(const mp_api_error *err, mp_buf *out) {
    json_t *param = err->param[0] ? mp_json_text(err->param, strlen(err->param)) : json_null();
    json_t *code = err->code ? json_string(err->code) : json_null();
    json_t *root =
        json_pack("{s:{s:o, s:s, s:o, s:o}}", "error", "message", mp_json_text(err->message, strlen(err->message)),
                  "type", mp_api_error_type(err->status), "param", param, "code", code);
    return mp_json_write(root, out);
}
