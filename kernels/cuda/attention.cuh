// What the attention kernels share: the parameter struct, the plan's items (src/cuda/attention_plan.rs), where keys lie, and how
// results are stored.
//
//   score(q, k) = scale * q . k, then soft_cap * tanh(score / soft_cap) if soft_cap > 0
//   out = softmax over the keys a row sees (score) . v
//
// A packed row is (token, query head of the KV head's group): token * group + head. The token at position p sees keys p - window + 1 ..= p,
// and later ones if not is_causal. Grid: (slots, kv_heads); a block computes the items of its slot for its KV head.
#pragma once

#include "galerne.cuh"

struct AttentionParams {
    View q;    // [rows, kv_heads * group * head_width]
    View out;  // likewise
    KvLayer kv;
    const uint32_t* plan;
    const uint32_t* block_table;  // [sequences][blocks_stride]
    float* partial;               // [partial rows][kv_heads][partial_stride]: a result, then the logarithm (base 2) of its sum
    uint32_t blocks_stride;
    uint32_t slots_at;  // where in the plan the slots of this kernel's items begin
    uint32_t group;
    uint32_t window;  // as many positions as there are if there is no window
    uint32_t is_causal;
    uint32_t block_shift;  // log2(block_tokens), or 32 if that is no whole number
    float scale;
    float soft_cap;  // 0: none
};

struct AttentionItem {
    uint32_t sequence, first_row, position, packed, rows, key_begin, key_end, partial;
};

constexpr uint32_t ITEM_WORDS = 8;
constexpr uint32_t WHOLE = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;

DEVICE AttentionItem attention_item(const uint32_t* words) {
    return {words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]};
}

// A packed row of an item: its place in q and out, and the keys it sees among the item's.
struct AttentionRow {
    size_t row;       // of q and out
    size_t column;    // likewise
    uint32_t begin;   // first key
    uint32_t end;     // one past the last key; not greater than begin if it sees none of the item's
    size_t partial;   // row of the workspace, over all KV heads
};

DEVICE AttentionRow attention_row(const AttentionParams& p, const AttentionItem& item, uint32_t kv_head, uint32_t index) {
    const uint32_t packed = item.packed + index, token = packed / p.group;
    const uint32_t position = item.position + token;
    const uint32_t first = position + 1 > p.window ? position + 1 - p.window : 0;
    AttentionRow row;
    row.row = item.first_row + token;
    row.column = static_cast<size_t>(kv_head * p.group + packed - token * p.group) * p.kv.head_width;
    row.begin = first > item.key_begin ? first : item.key_begin;
    row.end = p.is_causal && position + 1 < item.key_end ? position + 1 : item.key_end;
    row.partial = static_cast<size_t>(item.partial + index) * p.kv.kv_heads + kv_head;
    return row;
}

// Numbers from one partial result to the next: so many that each begins at a multiple of 16 bytes.
DEVICE uint32_t partial_stride(const AttentionParams& p) { return p.kv.head_width / 4 * 4 + 4; }

// Bytes from the pool's start to a block, and the key's place in it.
struct KeyPlace {
    size_t block;
    uint32_t slot;
};

DEVICE KeyPlace key_place(const AttentionParams& p, const uint32_t* blocks, uint32_t key) {
    const uint32_t index = p.block_shift < 32 ? key >> p.block_shift : key / p.kv.block_tokens;
    return {blocks[index] * p.kv.block_bytes, key - index * p.kv.block_tokens};
}
