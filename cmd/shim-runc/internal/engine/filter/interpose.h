// What stands between libseccomp and its callers in this program: see interpose.c.
#ifndef INTERPOSE_H
#define INTERPOSE_H

#include <stddef.h>

// filter_record makes the next export go to fd, and the calls that made the filter be kept; the export then fails with
// ECANCELED, so that nothing is loaded.
void filter_record(int fd);
// filter_recorded gives the calls kept, or NULL if nothing was exported.
const void *filter_recorded(size_t *len);
// filter_offer gives the program to export for a filter that is made by exactly these calls. Both must stay in memory.
void filter_offer(const void *calls, size_t calls_len, const void *program, size_t program_len);
// filter_used says whether the program offered was exported.
int filter_used(void);

#endif
