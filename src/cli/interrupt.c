#include "cli/interrupt.h"

#include <signal.h>
#include <stddef.h>

static volatile sig_atomic_t noted;

static void note(int signal_number) {
    (void)signal_number;
    noted = 1;
}

void mp_interrupt_arm(void) {
    noted = 0;
    /* SA_RESETHAND: the first signal takes the handler away, so the second has its usual effect. */
    struct sigaction action = { .sa_handler = note, .sa_flags = (int)SA_RESETHAND };
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

void mp_interrupt_disarm(void) {
    struct sigaction action = { .sa_handler = SIG_DFL };
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

bool mp_interrupted(void) {
    return noted != 0;
}
