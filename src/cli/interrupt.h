/* Ctrl-C: while armed, the first one is noted and the second one ends the process; otherwise it ends it at once.
 *
 * Signals belong to the process, so this is the one piece of global state of the programs. */
#ifndef MEPIC_CLI_INTERRUPT_H
#define MEPIC_CLI_INTERRUPT_H

#include <stdbool.h>

void mp_interrupt_arm(void);
void mp_interrupt_disarm(void);
bool mp_interrupted(void); /* since the last arm */

#endif
