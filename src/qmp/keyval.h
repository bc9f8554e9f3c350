/* KEY=VALUE,KEY.SUBKEY=VALUE,...: how the command line writes objects.
 *
 *     driver=qcow2,node-name=d0,file.driver=file,file.filename=/a,,b
 *     actions.0.type=abort                         lists: numbers from 0 without gaps
 *     qcow2,node-name=d0                           with an implied first key
 *
 * A comma in a value is doubled. Values are strings; schema_check(SCHEMA_FROM_KEYVAL) gives them
 * types. Rules and error texts are QEMU 7.2's. */
#pragma once

#include "base/error.h"
#include "base/json.h"

/* IMPLIED_KEY NULL: none. "help" or "?" sets *HELP; with HELP NULL it is an error. */
int keyval_parse(const char *text, const char *implied_key, bool *help, struct json_object **ret,
                 struct error *err);
