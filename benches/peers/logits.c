// Writes llama.cpp's logits for given tokens, in the form of `galerne bench logits`: text lines of token ids
// in, rows of f32 out. Everything is llama.cpp's default but the threads.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama.h"

#define TOKENS_MAX 2048
#define LINE_BYTES_MAX (16 * TOKENS_MAX)

static void quiet(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static int fail(const char *what) {
    fprintf(stderr, "logits: %s\n", what);
    return 1;
}

static int parse(char *line, llama_token *tokens) {
    int count = 0;
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
        if (count == TOKENS_MAX) return -1;
        tokens[count++] = (llama_token)strtol(word, NULL, 10);
    }
    return count;
}

static int run(struct llama_context *context, int vocabulary, FILE *in, FILE *out) {
    static char line[LINE_BYTES_MAX];
    static llama_token tokens[TOKENS_MAX];
    struct llama_batch batch = llama_batch_init(TOKENS_MAX, 0, 1);
    while (fgets(line, sizeof line, in)) {
        int count = parse(line, tokens);
        if (count < 0) return fail("a line has more than 2048 tokens");
        if (count == 0) continue;
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = count;
        for (int i = 0; i < count; i++) {
            batch.token[i] = tokens[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        if (llama_decode(context, batch) != 0) return fail("llama_decode failed");
        for (int i = 0; i < count; i++) {
            const float *row = llama_get_logits_ith(context, i);
            if (!row || fwrite(row, sizeof *row, (size_t)vocabulary, out) != (size_t)vocabulary)
                return fail("cannot write the logits");
        }
    }
    return fclose(out) == 0 ? 0 : fail("cannot write the logits");
}

int main(int argc, char **argv) {
    if (argc != 5) return fail("expected MODEL THREADS TOKENS OUT");
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fail("cannot load the model");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = TOKENS_MAX;
    params.n_batch = TOKENS_MAX;
    params.n_threads = params.n_threads_batch = atoi(argv[2]);
    struct llama_context *context = llama_init_from_model(model, params);
    FILE *in = fopen(argv[3], "r"), *out = fopen(argv[4], "wb");
    if (!context || !in || !out) return fail("cannot make the context or open the files");
    return run(context, llama_vocab_n_tokens(llama_model_get_vocab(model)), in, out);
}
