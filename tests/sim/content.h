/* What disk.c asks of content.c. */
#pragma once

#include "disk.h"

struct inode *content_new(struct store *s, bool in_memory);
void content_free(struct inode *i);
void content_lose_power(struct inode *i);
