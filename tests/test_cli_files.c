/* cli files: documents, tables, question files, and evaluation records that survive an interruption. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/conversation.h"
#include "cli/eval_record.h"
#include "cli/table.h"
#include "cli/xquad.h"

static char directory[64];

static const char *path_of(const char *name) {
    static char path[160];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static void write_file(const char *name, const char *bytes, size_t n) {
    FILE *file = fopen(path_of(name), "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

static void read_file(const char *name, char *out, size_t cap) {
    FILE *file = fopen(path_of(name), "r");
    assert_non_null(file);
    size_t n = fread(out, 1, cap - 1, file);
    out[n] = 0;
    fclose(file);
}

static void documents_are_title_and_content(void **state) {
    (void)state;
    mp_document document;
    mepic_error err;
    write_file("a.txt", "x\0\xffy\n\n", 6);
    assert_int_equal(mp_document_read(path_of("a.txt"), &document, &err), MEPIC_OK);
    assert_string_equal(document.name, "a.txt");
    assert_int_equal(document.len, 10);
    assert_memory_equal(document.text, "a.txt\nx\0\xffy", 10);
    mp_document_clear(&document);

    write_file("empty.txt", " \n\t", 3);
    assert_int_equal(mp_document_read(path_of("empty.txt"), &document, &err), MEPIC_ERR_ARGUMENT);
    assert_non_null(strstr(err.message, "empty.txt is empty"));
    assert_int_equal(mp_document_read(path_of("missing.txt"), &document, &err), MEPIC_ERR_IO);
    assert_non_null(strstr(err.message, "missing.txt cannot be opened"));
    assert_int_equal(mp_document_read(directory, &document, &err), MEPIC_ERR_IO);

    char *text;
    size_t len;
    assert_int_equal(mp_file_read(path_of("a.txt"), 6, &text, &len, &err), MEPIC_OK);
    assert_int_equal(len, 6);
    mp_free(text);
    assert_int_equal(mp_file_read(path_of("a.txt"), 5, &text, &len, &err), MEPIC_ERR_ARGUMENT);
}

static void documents_move_like_cards(void **state) {
    (void)state;
    mp_conversation c = { 0 };
    mepic_error err;
    const char *const names[] = { "d0", "d1", "d2", "d3" };
    for (int i = 0; i < 4; i++) {
        write_file(names[i], "text", 4);
        assert_int_equal(mp_conversation_add(&c, path_of(names[i]), &err), MEPIC_OK);
    }
    const char *order[] = { "d1", "d2", "d0", "d3" };
    mp_conversation_move(&c, 0, 2);
    for (int i = 0; i < 4; i++) assert_string_equal(c.documents[i].name, order[i]);
    mp_conversation_move(&c, 3, 0);
    mp_conversation_drop(&c, 1);
    const char *rest[] = { "d3", "d2", "d0" };
    assert_int_equal(c.n_documents, 3);
    for (int i = 0; i < 3; i++) assert_string_equal(c.documents[i].name, rest[i]);
    assert_int_equal(mp_conversation_ask(&c, "q", &err), MEPIC_OK);
    assert_int_equal(mp_conversation_answer(&c, "a b", 1, &err), MEPIC_OK);
    assert_string_equal(c.turns[0].answer, "a");
    mp_conversation_reset(&c);
    assert_int_equal(c.n_turns, 0);
    mp_conversation_clear(&c);
}

static void tables_align_characters_and_quote_fields(void **state) {
    (void)state;
    static const char *const columns[] = { "<name", "n" };
    mp_table table;
    mepic_error err;
    char text[256];
    mp_table_init(&table, columns, 2);
    mp_table_add(&table, "h\xc3\xa9");
    mp_table_add(&table, "%d", 12345);
    mp_table_add(&table, "a,\"b\"");
    mp_table_add(&table, "1");
    FILE *file = fopen(path_of("table.txt"), "w");
    mp_table_print(&table, file);
    fclose(file);
    read_file("table.txt", text, sizeof text);
    assert_string_equal(text, "name       n\nh\xc3\xa9     12345\na,\"b\"      1\n");
    assert_int_equal(mp_table_write_csv(&table, path_of("table.csv"), &err), MEPIC_OK);
    read_file("table.csv", text, sizeof text);
    assert_string_equal(text, "name,n\nh\xc3\xa9,12345\n\"a,\"\"b\"\"\",1\n");
    assert_int_equal(mp_table_write_csv(&table, "/nowhere/x.csv", &err), MEPIC_ERR_IO);
    mp_table_clear(&table);
}

static void question_files_are_checked(void **state) {
    (void)state;
    mp_xquad xquad;
    mepic_error err;
    static const char good[] = "{\"data\":[{\"paragraphs\":[{\"context\":\"P\",\"qas\":["
                               "{\"question\":\"Q\",\"answers\":[{\"text\":\"A\"},{\"text\":\"B\"}]},"
                               "{\"question\":\"no answers\",\"answers\":[]}]},{\"context\":\"R\",\"qas\":"
                               "[{\"question\":\"S\",\"answers\":[{\"text\":\"C\"}]}]}]}]}";
    write_file("good.json", good, sizeof good - 1);
    assert_int_equal(mp_xquad_open(&xquad, path_of("good.json"), &err), MEPIC_OK);
    assert_int_equal(xquad.n_paragraphs, 2);
    assert_int_equal(xquad.n_questions, 2);
    assert_string_equal(xquad.questions[0].answers[1], "B");
    assert_string_equal(xquad.questions[1].answers[0], "C");
    assert_int_equal(xquad.questions[1].paragraph, 1);
    mp_xquad_close(&xquad);
    static const char *const bad[] = { "", "{", "[]", "{\"data\":3}",
                                       "{\"data\":[{\"paragraphs\":[3,{\"qas\":[1]}]}]}" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_file("bad.json", bad[i], strlen(bad[i]));
        assert_int_equal(mp_xquad_open(&xquad, path_of("bad.json"), &err), MEPIC_ERR_FORMAT);
        assert_non_null(strstr(err.message, "bad.json"));
    }
    assert_int_equal(mp_xquad_open(&xquad, path_of("missing.json"), &err), MEPIC_ERR_IO);
}

static void records_go_on_after_an_interruption(void **state) {
    (void)state;
    mp_eval_record record;
    mepic_error err;
    const float log_p[3] = { -1.0f, -2.0f, -3.0f };
    float back[3];
    const mp_eval_line none = { .key = { 7, MP_EVAL_NONE, 0 }, .f1 = 0.5, .same = true, .prompt_tokens = 100 };
    const mp_eval_line linked = { .key = { 7, MP_EVAL_GIVEN, 16 }, .kl = 0.25, .linked_tokens = 3, .shared_tokens = 9 };
    assert_int_equal(mp_eval_record_open(&record, path_of("e.csv"), "# s", &err), MEPIC_OK);
    assert_int_equal(mp_eval_record_put_none(&record, 7, log_p, 3, &err), MEPIC_OK);
    assert_int_equal(mp_eval_record_add(&record, &none, "a,\n\"b\"", 6, &err), MEPIC_OK);
    assert_int_equal(mp_eval_record_add(&record, &linked, "other", 5, &err), MEPIC_OK);
    mp_eval_record_close(&record);

    FILE *file = fopen(path_of("e.csv"), "a");
    fputs("8,given,16,0.5,0.2", file); // what a killed process leaves
    fclose(file);
    assert_int_equal(mp_eval_record_open(&record, path_of("e.csv"), "# other", &err), MEPIC_ERR_ARGUMENT);
    assert_int_equal(mp_eval_record_open(&record, path_of("e.csv"), "# s", &err), MEPIC_OK);
    assert_int_equal(record.n, 2);
    const mp_eval_line *line = mp_eval_record_find(&record, &linked.key);
    assert_non_null(line);
    assert_true(line->kl == 0.25 && line->linked_tokens == 3 && line->shared_tokens == 9 && !line->same);
    assert_true(mp_eval_record_same_answer(&record, 7, "a,\n\"b\"", 6));
    assert_false(mp_eval_record_same_answer(&record, 7, "a", 1));
    assert_false(mp_eval_record_same_answer(&record, 8, "a", 1));
    assert_int_equal(mp_eval_record_get_none(&record, 7, back, 3, &err), MEPIC_OK);
    assert_memory_equal(back, log_p, sizeof back);
    assert_int_equal(mp_eval_record_get_none(&record, 8, back, 3, &err), MEPIC_ERR_IO);
    const mp_eval_line next = { .key = { 8, MP_EVAL_GIVEN, 16 } };
    assert_int_equal(mp_eval_record_add(&record, &next, "x", 1, &err), MEPIC_OK);
    mp_eval_record_close(&record);
    assert_int_equal(mp_eval_record_open(&record, path_of("e.csv"), "# s", &err), MEPIC_OK);
    assert_int_equal(record.n, 3);
    mp_eval_record_close(&record);
}

static int make_directory(void **state) {
    (void)state;
    snprintf(directory, sizeof directory, "/tmp/mepic-test-XXXXXX");
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
    (void)state;
    static const char *const names[] = { "a.txt",     "empty.txt", "d0",        "d1",       "d2",    "d3",
                                         "table.txt", "table.csv", "good.json", "bad.json", "e.csv", "e.csv.none" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unlink(path_of(names[i]));
    return rmdir(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(documents_are_title_and_content),          cmocka_unit_test(documents_move_like_cards),
        cmocka_unit_test(tables_align_characters_and_quote_fields), cmocka_unit_test(question_files_are_checked),
        cmocka_unit_test(records_go_on_after_an_interruption),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
