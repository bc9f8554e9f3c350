/* The command line's options: parsing, and checking what came of it against the largest schema. */
#include "qmp/keyval.h"
#include "qmp/schema_types.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = strndup((const char *)data, size);
    struct json_object *tree = NULL, *typed = NULL, *again = NULL;
    struct error err = ERROR_INIT;

    if (keyval_parse(text, "driver", NULL, &tree, &err) == 0 &&
        schema_check(&schema_BlockdevOptions, tree, SCHEMA_FROM_KEYVAL, &typed, &err) == 0) {
        /* what was typed is right as JSON, too */
        if (schema_check(&schema_BlockdevOptions, typed, SCHEMA_FROM_JSON, &again, &err) < 0)
            abort();
    }
    json_object_put(tree);
    json_object_put(typed);
    json_object_put(again);
    free(text);
    return 0;
}
