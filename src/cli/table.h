/* A table of text cells: printed aligned for people, written as CSV for programs. One thread. */
#ifndef MEPIC_CLI_TABLE_H
#define MEPIC_CLI_TABLE_H

#include "base/mem.h"
#include "base/status.h"

#include <stdio.h>

enum { MP_TABLE_MAX_COLUMNS = 24, MP_TABLE_MAX_ROWS = 4096 };

typedef struct mp_table {
    const char *const *columns; /* borrowed; a name that starts with '<' is left-aligned, without the '<' */
    uint32_t n_columns, n_cells;
    mp_buf text;    /* the cells, each terminated */
    mp_buf offsets; /* size_t of each cell in `text` */
    bool failed;    /* out of memory: a cell is missing */
} mp_table;

void mp_table_init(mp_table *table, const char *const *columns, uint32_t n_columns);
/* The next cell, row by row. */
void mp_table_add(mp_table *table, const char *format, ...) MP_PRINTF(2, 3);
void mp_table_print(const mp_table *table, FILE *file);
/* False: could not be written (message). */
mepic_status mp_table_write_csv(const mp_table *table, const char *path, mepic_error *err);
void mp_table_clear(mp_table *table);

/* One CSV field, quoted where it must be. */
void mp_csv_field(FILE *file, const char *text, size_t len);

#endif
