/* The words in these tables are what qemu-storage-daemon 7.2 answers to the same input. */
#include "qmp/keyval.h"
#include "qmp/schema_types.h"
#include "unit.h"

struct question {
    const struct schema_type *type;
    const char *input;
    const char *answer; /* the error, or the typed tree */
};

static void ask(const struct question *q, enum schema_source source)
{
    CLEANUP(json_putp) struct json_object *in = NULL;
    CLEANUP(json_putp) struct json_object *out = NULL;
    struct error err = ERROR_INIT;
    int r = 0;

    if (source == SCHEMA_FROM_JSON)
        in = json_tokener_parse(q->input);
    else
        r = keyval_parse(q->input, "driver", NULL, &in, &err);
    if (r == 0)
        r = schema_check(q->type, in, source, &out, &err);
    const char *got =
        r < 0 ? err.text : json_object_to_json_string_ext(out, JSON_C_TO_STRING_PLAIN);
    if (strcmp(got, q->answer))
        fail_msg("%s\n   gave %s\n   not  %s", q->input, got, q->answer);
}

#define ADD &schema_BlockdevOptions
#define TX &schema_TransactionArg
static const struct question json_questions[] = {
    {ADD, "{}", "Parameter 'driver' is missing"},
    {ADD, "{'driver':5}", "Invalid parameter type for 'driver', expected: string"},
    {ADD, "{'driver':'foo'}", "Parameter 'driver' does not accept value 'foo'"},
    {ADD, "{'driver':'luks'}",
     "Parameter 'driver' does not accept value 'luks': not supported yet"},
    {ADD, "{'driver':'qcow2','file':{'driver':'file'}}", "Parameter 'file.filename' is missing"},
    {ADD, "{'driver':'qcow2','file':{'driver':'file','filename':'a','x':1}}",
     "Parameter 'file.x' is unexpected"},
    {ADD, "{'driver':'qcow2','file':5}",
     "Invalid parameter type for 'file', expected: BlockdevRef"},
    {ADD, "{'driver':'file','filename':'a','cache':{'direct':'on'}}",
     "Invalid parameter type for 'cache.direct', expected: boolean"},
    {ADD, "{'driver':'file','cache':[]}", "Invalid parameter type for 'cache', expected: object"},
    {ADD, "{'driver':'file','filename':null}",
     "Invalid parameter type for 'filename', expected: string"},
    {ADD, "{'driver':'raw','file':null}",
     "Invalid parameter type for 'file', expected: BlockdevRef"},
    {ADD, "{'driver':'qcow2','file':'x','overlap-check':{'template':'foo'}}",
     "Parameter 'template' does not accept value 'foo'"},
    {ADD, "{'driver':'null-co','latency-ns':'x'}", "Parameter 'latency-ns' expects uint64"},
    {ADD, "{'driver':'null-co','size':1.0}",
     "Invalid parameter type for 'size', expected: integer"},
    {&schema_NbdServerStartArg, "{'addr':{'type':'unix','data':{'path':'x'}},'tls-creds':'t'}",
     "Parameter 'tls-creds' is not supported yet"},
    {&schema_NbdServerStartArg, "{'addr':{'type':'unix','data':{'path':'x'}},'tls-creds':1}",
     "Invalid parameter type for 'tls-creds', expected: string"},
    {TX, "{'actions':[{'type':'abort'}]}", "Parameter 'actions[0].data' is missing"},
    {TX, "{'actions':[{'type':'block-dirty-bitmap-add','data':{'node':1}}]}",
     "Invalid parameter type for 'actions[0].data.node', expected: string"},
    {TX, "{'actions':[3]}", "Invalid parameter type for 'actions[0]', expected: object"},
    {TX, "{'actions':{}}", "Invalid parameter type for 'actions', expected: array"},
    {TX,
     "{'actions':[{'type':'blockdev-backup','data':{'device':'a','target':'b','sync':'full',"
     "'compress':true}}]}",
     "Parameter 'actions[0].data.compress' is not supported yet"},
    {&schema_BlockDirtyBitmapAdd, "{'node':'a','name':'b','granularity':'64k'}",
     "Parameter 'granularity' expects uint64"},
    {&schema_BlockDirtyBitmapAdd, "{'node':'a','name':'b','granularity':4294967296}",
     "Parameter 'granularity' expects uint32_t"},
    {&schema_BlockDirtyBitmapAdd, "{'node':'a','name':'b','granularity':-1}",
     "Parameter 'granularity' expects uint32_t"},
    {&schema_BlockDirtyBitmapMerge, "{'node':'a','target':'b','bitmaps':[5]}",
     "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr"},
    {&schema_BlockDirtyBitmapMerge, "{'node':'a','target':'b','bitmaps':[{'node':'x'}]}",
     "Parameter 'bitmaps[0].name' is missing"},
    {&schema_QmpCapabilitiesArg, "{'enable':['foo']}",
     "Parameter 'null' does not accept value 'foo'"},
    {&schema_QmpCapabilitiesArg, "{'enable':[5]}",
     "Invalid parameter type for 'enable[0]', expected: string"},
    {&schema_BlockResizeArg, "{'node-name':'x','size':18446744073709551615}",
     "Invalid parameter type for 'size', expected: integer"},
    {&schema_nothing, "{'a':1}", "Parameter 'a' is unexpected"},
    /* and what is right */
    {ADD, "{'backing':null,'file':'f','driver':'qcow2'}",
     "{\"driver\":\"qcow2\",\"file\":\"f\",\"backing\":null}"},
    {&schema_BlockdevCreateArg,
     "{'job-id':'j','options':{'driver':'file','filename':'f','size':18446744073709551615}}",
     "{\"job-id\":\"j\",\"options\":{\"driver\":\"file\",\"filename\":\"f\","
     "\"size\":18446744073709551615}}"},
    {&schema_BlockDirtyBitmapMerge,
     "{'node':'a','target':'b','bitmaps':['c',{'node':'x','name':'y'}]}",
     "{\"node\":\"a\",\"target\":\"b\",\"bitmaps\":[\"c\",{\"node\":\"x\",\"name\":\"y\"}]}"},
    {&schema_BlockdevBackup,
     "{'device':'a','target':'b','sync':'bitmap','bitmap-mode':'conditional','compress':false}",
     "{\"device\":\"a\",\"sync\":\"bitmap\",\"bitmap-mode\":\"on-success\",\"compress\":false,"
     "\"target\":\"b\"}"},
};

static void json_is_checked_in_qemus_words(void **state)
{
    for (size_t i = 0; i < ARRAY_SIZE(json_questions); i++)
        ask(&json_questions[i], SCHEMA_FROM_JSON);
}

#define EXPORT &schema_BlockExportOptions
#define SERVER &schema_NbdServerOptions
static const struct question keyval_questions[] = {
    {ADD, "driver=file,filename=a,cache=1", "Invalid parameter type for 'cache', expected: object"},
    {ADD, "driver=file,filename.x=a", "Parameters 'filename.*' are unexpected"},
    {ADD, "foo", "Parameter 'driver' does not accept value 'foo'"},
    {ADD, "driver=null-co,size=1k", "Parameter 'size' expects integer"},
    {ADD, "driver=null-co,read-only=maybe", "Parameter 'read-only' expects 'on' or 'off'"},
    {ADD, "driver=null-co,read-only", "Expected '=' after parameter 'read-only'"},
    {ADD, "driver=null-co,a.0=1,a.2=1", "Parameter 'a.1' missing"},
    {ADD, "driver=null-co,a.b=1,a=1", "Parameters 'a.*' used inconsistently"},
    {ADD, "driver=null-co,1x=2", "Invalid parameter '1x'"},
    {ADD, "driver=null-co,=2", "Invalid parameter ''"},
    {ADD, "driver=null-co,a.=2", "Invalid parameter 'a.'"},
    {ADD, "driver=null-co,a.x-=2", "Parameter 'a' is unexpected"},
    {ADD, "help", "Help is not available for this option"},
    {ADD, "driver=null-co,?", "Help is not available for this option"},
    {ADD, "driver=null-co,a.1.b=3,a.x=1", "Parameters 'a.*' used inconsistently"},
    {ADD, "driver=null-co,,x", "Parameter 'driver' does not accept value 'null-co,x'"},
    {EXPORT, "type=nbd,id=e,node-name=n,bitmaps.0=5,bitmaps.2=6", "Parameter 'bitmaps.1' missing"},
    {EXPORT, "type=nbd,id=e,node-name=n,bitmaps.0.node=5", "Parameter 'bitmaps.0.name' is missing"},
    {EXPORT, "type=nbd,id=e,node-name=n,bitmaps=5",
     "Invalid parameter type for 'bitmaps', expected: array"},
    {SERVER, "addr.type=inet,addr.host=localhost,addr.port=1,addr.to=99999",
     "Parameter 'to' expects uint16_t"},
    {SERVER, "addr.type=inet,addr.host=localhost,addr.port=1,addr.to=abc",
     "Parameter 'addr.to' expects integer"},
    /* and what is right */
    {ADD, "file,filename=a,,b,read-only=on,cache.direct=off",
     "{\"driver\":\"file\",\"cache\":{\"direct\":false},\"read-only\":true,\"filename\":\"a,b\"}"},
    {ADD, "null-co,size=0x200,", "{\"driver\":\"null-co\",\"size\":512}"},
    {ADD, "qcow2,backing=b,file.driver=file,file.filename=x=y",
     "{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"x=y\"},"
     "\"backing\":\"b\"}"},
    {EXPORT, "type=nbd,id=e,node-name=n,bitmaps.1.node=a,bitmaps.1.name=b,bitmaps.0=c",
     "{\"type\":\"nbd\",\"id\":\"e\",\"node-name\":\"n\",\"bitmaps\":[\"c\","
     "{\"node\":\"a\",\"name\":\"b\"}]}"},
    {&schema_BlockdevCreateArg, "job-id=j,options.driver=file,options.filename=f,options.size=1.5k",
     "{\"job-id\":\"j\",\"options\":{\"driver\":\"file\",\"filename\":\"f\",\"size\":1536}}"},
};

static void keyval_is_checked_in_qemus_words(void **state)
{
    for (size_t i = 0; i < ARRAY_SIZE(keyval_questions); i++)
        ask(&keyval_questions[i], SCHEMA_FROM_KEYVAL);
}

static void sizes_are_read_as_qemu_reads_them(void **state)
{
    static const struct {
        const char *text;
        int result;
        uint64_t size;
    } sizes[] = {
        {"0", 0, 0},
        {"512", 0, 512},
        {"512B", 0, 512},
        {"64k", 0, 65536},
        {"1.5G", 0, 1610612736},
        {"1.k", 0, 1024},
        {"0x200", 0, 512},
        {"16E", -ERANGE, 0},
        {"15E", 0, UINT64_C(15) << 60},
        {"18446744073709551616", -ERANGE, 0},
        {"1.5", -EINVAL, 0},
        {"-1", -EINVAL, 0},
        {"", -EINVAL, 0},
        {"k", -EINVAL, 0},
        {"1kk", -EINVAL, 0},
        {"1e3", -EINVAL, 0},
    };

    for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
        uint64_t size = 0;
        int r = schema_parse_size(sizes[i].text, &size);
        if (r != sizes[i].result || size != sizes[i].size)
            fail_msg("'%s': %d, %llu", sizes[i].text, r, (unsigned long long)size);
    }
}

/* The path to any depth names every step; a tree deeper than anyone needs is refused. */
static void deep_trees_are_refused(void **state)
{
    CLEANUP(json_putp) struct json_object *in = json_object_new_object();
    CLEANUP(json_putp) struct json_object *out = NULL;
    struct error err = ERROR_INIT;

    json_add_string(in, "driver", "null-co");
    for (int i = 0; i < 5000; i++) {
        struct json_object *outer = json_object_new_object();
        json_add_string(outer, "driver", "raw");
        json_add(outer, "file", in);
        in = outer;
    }
    assert_int_equal(schema_check(ADD, in, SCHEMA_FROM_JSON, &out, &err), -EINVAL);
    assert_non_null(strstr(err.text, "levels deep"));
}

static struct json_object *find(struct json_object *list, const char *name)
{
    for (size_t i = 0; i < json_object_array_length(list); i++) {
        struct json_object *one = json_object_array_get_idx(list, i);
        if (!strcmp(json_get_string(one, "name", ""), name))
            return one;
    }
    fail_msg("introspection does not have '%s'", name);
    return NULL;
}

/* Walks as libvirt does: command, argument type, branch, member. */
static void introspection_can_be_walked(void **state)
{
    static const struct schema_command commands[] = {
        {"blockdev-add", &schema_BlockdevOptions},
        {"quit", .allow_oob = true},
        {"drive-backup", &schema_DriveBackup, .features = SCHEMA_DEPRECATED},
        {"query-blockstats", NULL, &schema_BlockStatsList},
        {0},
    };
    static const struct schema_event events[] = {{"BLOCK_JOB_READY", &schema_BlockJobEnd}, {0}};
    CLEANUP(json_putp) struct json_object *all = schema_introspect(commands, events);
    CLEANUP(json_putp) struct json_object *typed = NULL;
    struct error err = ERROR_INIT;

    /* the answer is itself what the schema says of it */
    if (schema_check(&schema_SchemaInfoList, all, SCHEMA_FROM_JSON, &typed, &err) < 0)
        fail_msg("%s", err.text);
    assert_true(json_get_bool(find(all, "quit"), "allow-oob", false));
    assert_string_equal(json_object_get_string(json_get(find(all, "drive-backup"), "features")),
                        "[ \"deprecated\" ]");
    struct json_object *add =
        find(all, json_get_string(find(all, "blockdev-add"), "arg-type", NULL));
    assert_string_equal(json_get_string(add, "tag", ""), "driver");
    struct json_object *variants = json_get(add, "variants");
    bool file = false;
    for (size_t i = 0; i < json_object_array_length(variants); i++) {
        struct json_object *v = json_object_array_get_idx(variants, i);
        assert_string_not_equal(json_get_string(v, "case", ""), "luks");
        struct json_object *type = find(all, json_get_string(v, "type", NULL));
        if (strcmp(json_get_string(v, "case", ""), "file"))
            continue;
        file = true;
        assert_string_equal(json_object_get_string(json_get(type, "features")),
                            "[ \"dynamic-auto-read-only\" ]");
    }
    assert_true(file);
    assert_string_equal(json_get_string(find(all, "int"), "json-type", ""), "int");
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(json_is_checked_in_qemus_words),
    cmocka_unit_test(keyval_is_checked_in_qemus_words),
    cmocka_unit_test(sizes_are_read_as_qemu_reads_them),
    cmocka_unit_test(deep_trees_are_refused),
    cmocka_unit_test(introspection_can_be_walked),
};
UNIT_MAIN(tests)
