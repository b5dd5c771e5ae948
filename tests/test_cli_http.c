/* cli/http_client: addresses, answers and streams of events, however the bytes are cut. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <string.h>

#include "cli/http_client.h"

static void addresses_come_apart(void **state) {
    (void)state;
    static const struct {
        const char *text, *host, *port, *path;
    } good[] = {
        { "http://127.0.0.1:8080", "127.0.0.1", "8080", "" },
        { "localhost", "localhost", "80", "" },
        { "HTTP://host:1/", "host", "1", "" },
        { "http://[::1]:8080/v0//", "::1", "8080", "/v0" },
        { "host/a/b", "host", "80", "/a/b" },
        { "[::1]", "::1", "80", "" },
    };
    mp_url url;
    mepic_error err;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(mp_url_parse(good[i].text, &url, &err), MEPIC_OK);
        assert_string_equal(url.host, good[i].host);
        assert_string_equal(url.port, good[i].port);
        assert_string_equal(url.path, good[i].path);
    }
    static const char *const bad[] = { "",          "http://",     "https://host", "ftp://host", "host:",
                                       "host:x",    "host:123456", "host:65536",   "host:80x",   "[::1",
                                       "ho st",     "me@host",     "host/a?b",     "host/\r\nX", ":80",
                                       "http://[]", "[::1]x" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (mp_url_parse(bad[i], &url, &err) != MEPIC_ERR_ARGUMENT) fail_msg("'%s' was taken", bad[i]);
    }
}

/* What was handed on, with '|' behind each event. */
static mp_buf seen;

static mepic_status take(void *user, const char *bytes, size_t n, mepic_error *err) {
    (void)err;
    assert_true(mp_buf_append(&seen, bytes, n));
    if (user) assert_true(mp_buf_append(&seen, "|", 1));
    return MEPIC_OK;
}

static void expect_seen(const char *want) {
    if (seen.len != strlen(want) || memcmp(seen.data ? seen.data : "", want, seen.len) != 0)
        fail_msg("'%.*s' instead of '%s'", (int)seen.len, seen.data ? seen.data : "", want);
}

/* Feeds `text` in pieces of `piece` bytes and ends the connection. */
static mepic_status feed(const char *text, size_t piece, mp_http_reader *reader, mepic_error *err) {
    *reader = (mp_http_reader){ 0 };
    seen = (mp_buf){ .data = seen.data, .cap = seen.cap, .limit = 1 << 20 };
    size_t n = strlen(text);
    for (size_t at = 0; at < n; at += piece) {
        mepic_status status = mp_http_feed(reader, text + at, n - at < piece ? n - at : piece, take, NULL, err);
        if (status != MEPIC_OK) return status;
    }
    return mp_http_finish(reader, err);
}

static void answers_are_read_in_any_pieces(void **state) {
    (void)state;
    static const struct {
        const char *text, *body;
        uint32_t status;
    } good[] = {
        { "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello", 200 },
        { "HTTP/1.1 404 Not Found\r\ncontent-length:0\r\n\r\n", "", 404 },
        { "HTTP/1.0 200 OK\r\n\r\nuntil the end\n", "until the end\n", 200 },
        { "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", "x", 200 },
        { "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel\n\n\r\nA;x=y\r\n0123456789\r\n0\r\nT: "
          "v\r\n\r\n",
          "hel\n\n0123456789", 200 },
        { "HTTP/1.1 200 OK\nTransfer-Encoding: Chunked\n\n1\nx\n0\n\n", "x", 200 },
        { "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx and more", "x", 200 },
    };
    mp_http_reader reader;
    mepic_error err;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        for (size_t piece = 1; piece <= strlen(good[i].text); piece++) {
            assert_int_equal(feed(good[i].text, piece, &reader, &err), MEPIC_OK);
            assert_int_equal(reader.status, good[i].status);
            expect_seen(good[i].body);
        }
    }
    static const struct {
        const char *text;
        mepic_status status;
    } bad[] = {
        { "SSH-2.0-OpenSSH\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 abc\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nno header\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxy\r\n", MEPIC_ERR_FORMAT },
        { "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n", MEPIC_ERR_IO },
        { "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", MEPIC_ERR_IO },
        { "HTTP/1.1 200 OK\r\n", MEPIC_ERR_IO },
        { "", MEPIC_ERR_IO },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        for (size_t piece = 1; piece <= strlen(bad[i].text) + 1; piece++) {
            if (feed(bad[i].text, piece, &reader, &err) != bad[i].status) fail_msg("'%s' was taken", bad[i].text);
        }
    }
    static char endless[8192];
    memset(endless, 'x', sizeof endless - 1);
    assert_int_equal(feed(endless, 100, &reader, &err), MEPIC_ERR_FORMAT);
}

static void events_are_read_in_any_pieces(void **state) {
    (void)state;
    static const struct {
        const char *text, *events;
    } streams[] = {
        { "data: one\n\ndata:two\r\n\r\ndata: three\r\rdata: lost", "one|two|three|" },
        { ": a comment\n\nevent: x\nid: 7\ndata: {\"a\":1}\n\n\n\n", "{\"a\":1}|" },
        { "data: a\ndata: b\ndata:  c\n\n", "a\nb\n c|" },
        { "data: a\r\ndata: b\r\n\r\n", "a\nb|" },
        { "data:\n\ndata\n\ndatax: y\n\n", "|" },
        { "", "" },
    };
    mepic_error err;
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++) {
        size_t n = strlen(streams[i].text);
        for (size_t piece = 1; piece <= n; piece++) {
            bool mark = true;
            mp_sse sse = { .take = take, .user = &mark };
            seen = (mp_buf){ .data = seen.data, .cap = seen.cap, .limit = 1 << 20 };
            for (size_t at = 0; at < n; at += piece) {
                size_t m = n - at < piece ? n - at : piece;
                assert_int_equal(mp_sse_feed(&sse, streams[i].text + at, m, &err), MEPIC_OK);
            }
            expect_seen(streams[i].events);
            mp_sse_clear(&sse);
        }
    }
    mp_buf_clear(&seen);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(addresses_come_apart),
        cmocka_unit_test(answers_are_read_in_any_pieces),
        cmocka_unit_test(events_are_read_in_any_pieces),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
