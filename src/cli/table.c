#include "cli/table.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

enum { CELL_MAX = 512 };

void mp_table_init(mp_table *table, const char *const *columns, uint32_t n_columns) {
    *table = (mp_table){ .columns = columns, .n_columns = n_columns };
    table->text.limit = (size_t)MP_TABLE_MAX_ROWS * MP_TABLE_MAX_COLUMNS * CELL_MAX;
    table->offsets.limit = (size_t)MP_TABLE_MAX_ROWS * MP_TABLE_MAX_COLUMNS * sizeof(size_t);
}

void mp_table_add(mp_table *table, const char *format, ...) {
    char cell[CELL_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(cell, sizeof cell, format, args);
    va_end(args);
    size_t at = table->text.len;
    bool ok = !table->failed && mp_buf_append(&table->text, cell, strlen(cell) + 1) &&
              mp_buf_append(&table->offsets, &at, sizeof at);
    if (ok) table->n_cells++;
    table->failed = !ok;
}

static const char *cell_at(const mp_table *table, uint32_t i) {
    size_t at;
    memcpy(&at, table->offsets.data + i * sizeof at, sizeof at);
    return table->text.data + at;
}

static bool is_left(const mp_table *table, uint32_t column) {
    return table->columns[column][0] == '<';
}

static const char *title_of(const mp_table *table, uint32_t column) {
    return table->columns[column] + is_left(table, column);
}

/* Columns of a terminal: characters, not bytes. */
static uint32_t width_of(const char *s) {
    uint32_t n = 0;
    for (; *s; s++) n += ((unsigned char)*s & 0xC0u) != 0x80u;
    return n;
}

static void print_cell(FILE *file, const char *text, uint32_t width, bool left, bool last) {
    uint32_t pad = width - width_of(text);
    if (left) {
        fprintf(file, "%s%*s", text, last ? 0 : (int)pad, "");
    } else {
        fprintf(file, "%*s%s", (int)pad, "", text);
    }
    fputs(last ? "\n" : "  ", file);
}

void mp_table_print(const mp_table *table, FILE *file) {
    uint32_t widths[MP_TABLE_MAX_COLUMNS] = { 0 };
    uint32_t n = table->n_columns;
    for (uint32_t c = 0; c < n; c++) widths[c] = width_of(title_of(table, c));
    for (uint32_t i = 0; i < table->n_cells; i++) {
        uint32_t width = width_of(cell_at(table, i));
        if (width > widths[i % n]) widths[i % n] = width;
    }
    for (uint32_t c = 0; c < n; c++) print_cell(file, title_of(table, c), widths[c], is_left(table, c), c + 1 == n);
    for (uint32_t i = 0; i < table->n_cells; i++) {
        uint32_t c = i % n;
        print_cell(file, cell_at(table, i), widths[c], is_left(table, c), c + 1 == n);
    }
}

void mp_csv_field(FILE *file, const char *text, size_t len) {
    bool quote = false;
    for (size_t i = 0; i < len; i++) quote |= strchr(",\"\r\n", text[i]) != NULL;
    if (!quote) {
        fwrite(text, 1, len, file);
        return;
    }
    fputc('"', file);
    for (size_t i = 0; i < len; i++) {
        if (text[i] == '"') fputc('"', file);
        fputc(text[i], file);
    }
    fputc('"', file);
}

mepic_status mp_table_write_csv(const mp_table *table, const char *path, mepic_error *err) {
    FILE *file = fopen(path, "w");
    if (!file) return mp_fail(err, MEPIC_ERR_IO, "%s cannot be written: %s", path, strerror(errno));
    for (uint32_t c = 0; c < table->n_columns; c++) {
        const char *title = title_of(table, c);
        mp_csv_field(file, title, strlen(title));
        fputc(c + 1 == table->n_columns ? '\n' : ',', file);
    }
    for (uint32_t i = 0; i < table->n_cells; i++) {
        const char *cell = cell_at(table, i);
        mp_csv_field(file, cell, strlen(cell));
        fputc(i % table->n_columns + 1 == table->n_columns ? '\n' : ',', file);
    }
    bool ok = !ferror(file);
    if (fclose(file) != 0 || !ok) {
        return mp_fail(err, MEPIC_ERR_IO, "%s could not be written whole: %s", path, strerror(errno));
    }
    return MEPIC_OK;
}

void mp_table_clear(mp_table *table) {
    mp_buf_clear(&table->text);
    mp_buf_clear(&table->offsets);
}
