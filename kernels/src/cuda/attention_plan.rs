//! Who computes which part of a step's attention: pure arithmetic over the sequences' lengths, knows no device.
//!
//! The rows of one sequence are (token, query head of the group) pairs, token by token: packed row `t * group + h`. They are
//! cut into tiles, small ones of 16 rows where all fit in one (decode), else large ones. The keys that a tile sees are cut
//! into units of [`UNIT_KEYS`]. As many blocks run at once as the device holds, the *slots*, for each KV head alike; each
//! gets an equal run of all tiles' units, so that nobody waits for a longest block, and one captured launch serves
//! every step. A tile whose units fall to several slots leaves partial results that `attention_merge` joins.
//!
//! Sequences that follow each other, decode, and begin with the same blocks can share a tile for these: their rows lie together,
//! and every row sees all of the shared keys. What follows is each one's own tile, joined with the shared one.
//!
//! On the device a plan is a list of u32 words:
//! `[merges, first merge's word, 0, 0]`, `[slots + 1]` words where each slot's small items begin, the same for large ones, then
//! items ([`Item`], 8 words each) and merges ([`Merge`], 8 words each).

use std::ops::Range;

use crate::device::SequenceSlice;
use crate::program::AttentionLayer;

/// Keys of one unit of work. Items begin at a multiple of it.
pub const UNIT_KEYS: u32 = 64;
/// Rows of a small tile.
pub const SMALL_ROWS: u32 = 16;
/// Rows of a large tile: of `attention_prefill` and `attention_exact`, and of `attention_prefill_sm90`.
const LARGE_ROWS: [u32; 2] = [64, 128];
/// What starting and ending an item costs, in units of keys. A guess: no GPU has been asked.
const ITEM_UNITS: u32 = 1;
/// Less than this is not worth a slot of its own.
const SLOT_UNITS_MIN: u32 = 2 + ITEM_UNITS;
/// Fewer shared keys are not worth a tile.
const SHARED_KEYS_MIN: u32 = 4 * UNIT_KEYS;
/// Blocks that a multiprocessor holds at once, of heads up to 128 and wider.
const BLOCKS_PER_MULTIPROCESSOR: [u32; 2] = [2, 1];
/// [`Item::partial`] of an item that has all of its tile's keys.
pub const WHOLE: u32 = u32::MAX;
/// Words before the slots.
const HEADER_WORDS: usize = 4;
const ITEM_WORDS: usize = 8;
const MERGE_WORDS: usize = 8;

/// What a plan depends on. Layers of equal shape share a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlanShape {
    /// Query heads per KV head.
    pub group: u32,
    /// KV heads; each has its own blocks that do the same.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_width: u32,
    /// Whether a token sees only itself and earlier ones.
    pub causal: bool,
    /// A token sees at most this many last positions.
    pub sliding_window: Option<u32>,
    /// Rows of a large tile.
    pub large_rows: u32,
    /// Blocks per KV head that run at once, of small tiles and of large ones.
    pub slots: [u32; 2],
    /// Tokens of a KV block if sequences may share tiles for the blocks they have in common.
    pub shared_block_tokens: Option<u32>,
}

/// How much memory the plans of a shape need at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanCapacity {
    /// Words of a plan.
    pub words: usize,
    /// f32 numbers of the workspace for partial results, which all layers can share.
    pub partial_floats: usize,
}

/// A part of a tile that one block computes for its KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Item {
    /// Row of the block table.
    pub sequence: u32,
    /// Row of the sequence's first token in the step.
    pub first_row: u32,
    /// That token's position.
    pub position: u32,
    /// First packed row.
    pub packed: u32,
    /// Packed rows.
    pub rows: u32,
    /// First key, a multiple of [`UNIT_KEYS`].
    pub key_begin: u32,
    /// One past the last key.
    pub key_end: u32,
    /// Where the partial result's first row goes, or [`WHOLE`].
    pub partial: u32,
}

/// A tile whose parts are to be joined; with no parts its rows become zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Merge {
    /// Row of the sequence's first token in the step.
    pub first_row: u32,
    /// First packed row.
    pub packed: u32,
    /// Packed rows.
    pub rows: u32,
    /// First row of the first part; the next ones follow, each `rows` long.
    pub partial: u32,
    /// Parts.
    pub parts: u32,
    /// The tile's first row in the first part of a shared tile,
    pub shared: u32,
    /// rows from there to the next part,
    pub shared_rows: u32,
    /// and how many parts there are.
    pub shared_parts: u32,
}

/// The plan of one step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Items of small tiles, slot by slot.
    pub small: SlotItems,
    /// Items of large tiles.
    pub large: SlotItems,
    /// Tiles to join, and rows to zero.
    pub merges: Vec<Merge>,
}

/// Items by slot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotItems {
    /// All items.
    pub items: Vec<Item>,
    /// Where each slot's items begin, and the end.
    pub begins: Vec<u32>,
}

/// A tile before it is cut.
#[derive(Clone, Copy)]
struct Tile {
    whole: Item,
    units: u32,
    role: Role,
}

/// Whether a tile has all of its rows' keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It has.
    Alone,
    /// It has those that several sequences share.
    Shared,
    /// It has what follows the keys of the shared tile before it, in which its first row is this one.
    Rest(u32),
}

impl PlanShape {
    /// The shape of a layer on a device of so many multiprocessors.
    #[must_use]
    pub fn new(layer: &AttentionLayer, multiprocessors: u32) -> Self {
        let blocks = BLOCKS_PER_MULTIPROCESSOR[usize::from(layer.head_width > 128)];
        let slots = slots(multiprocessors * blocks, layer.kv_heads);
        Self {
            group: layer.heads / layer.kv_heads,
            kv_heads: layer.kv_heads,
            head_width: layer.head_width,
            causal: layer.causal,
            sliding_window: layer.sliding_window,
            large_rows: LARGE_ROWS[0],
            slots: [slots, slots],
            shared_block_tokens: None,
        }
    }

    /// The same with shared tiles, where the layer's rows see all of their sequence and more than one's fit a tile.
    #[must_use]
    pub fn with_shared_blocks(self, block_tokens: u32) -> Self {
        let can = self.sliding_window.is_none() && 2 * self.group <= SMALL_ROWS;
        Self {
            shared_block_tokens: can.then_some(block_tokens),
            ..self
        }
    }

    /// The same with the tiles of `attention_prefill_sm90`, of which a multiprocessor holds one.
    #[must_use]
    pub fn with_warpgroups(self, multiprocessors: u32) -> Self {
        Self {
            large_rows: LARGE_ROWS[1],
            slots: [self.slots[0], slots(multiprocessors, self.kv_heads)],
            ..self
        }
    }

    /// Whether its large tiles are those of `attention_prefill_sm90`.
    #[must_use]
    pub const fn has_warpgroups(&self) -> bool {
        self.large_rows == LARGE_ROWS[1]
    }

    /// Whether one token's rows fit a small tile.
    #[must_use]
    pub const fn decodes_in_small_tiles(&self) -> bool {
        self.group <= SMALL_ROWS
    }

    /// What any step of at most so many tokens and sequences needs.
    #[must_use]
    pub fn capacity(&self, step_tokens_max: usize, sequences_max: usize) -> PlanCapacity {
        let [small, large] = self.slots.map(|slots| slots as usize);
        // Each end of a slot cuts one tile in two.
        let cuts = small + large - 2;
        let shared = self.shared_block_tokens.map_or(0, |_| sequences_max);
        let tiles =
            sequences_max + shared / 2 + step_tokens_max * self.group as usize / self.large_rows as usize;
        PlanCapacity {
            words: HEADER_WORDS
                + small
                + large
                + 2
                + ITEM_WORDS * (tiles + cuts)
                + MERGE_WORDS * (cuts + shared + 1),
            partial_floats: self.partial_rows_max(sequences_max)
                * self.kv_heads as usize
                * (self.head_width as usize / 4 * 4 + 4),
        }
    }

    /// Rows of partial results at most, for each KV head.
    fn partial_rows_max(&self, sequences_max: usize) -> usize {
        let cut = 2 * ((self.slots[0] - 1) * SMALL_ROWS + (self.slots[1] - 1) * self.large_rows) as usize;
        // A sequence's rows in the shared tile and in its own.
        let shared = self
            .shared_block_tokens
            .map_or(0, |_| 2 * sequences_max * self.group as usize);
        cut + shared
    }

    /// Plans a step whose buffers have `rows` rows, of which those past the sequences' tokens are padding.
    pub fn plan(&self, sequences: &[SequenceSlice], rows: usize, plan: &mut Plan) {
        plan.merges.clear();
        let mut partial = 0;
        let is_small =
            |slice: &SequenceSlice| slice.tokens as u64 * u64::from(self.group) <= u64::from(SMALL_ROWS);
        for (small, tile_rows, slots, list) in [
            (true, SMALL_ROWS, self.slots[0], &mut plan.small),
            (false, self.large_rows, self.slots[1], &mut plan.large),
        ] {
            let tiles: Vec<Tile> = sequences
                .iter()
                .enumerate()
                .filter(|(_, slice)| is_small(slice) == small)
                .flat_map(|(index, slice)| self.tiles(index as u32, slice, tile_rows))
                .collect();
            let tiles = if small {
                self.shared(tiles, sequences)
            } else {
                tiles
            };
            share(&tiles, slots, &mut partial, list, &mut plan.merges);
        }
        let tokens = sequences.last().map_or(0, |last| last.first_token + last.tokens);
        if tokens < rows {
            plan.merges.push(Merge {
                first_row: tokens as u32,
                rows: (rows - tokens) as u32 * self.group,
                ..Merge::default()
            });
        }
    }

    fn tiles(&self, sequence: u32, slice: &SequenceSlice, tile_rows: u32) -> impl Iterator<Item = Tile> {
        let Self {
            group,
            causal,
            sliding_window,
            ..
        } = *self;
        let (first_row, position, tokens) = (slice.first_token as u32, slice.position, slice.tokens as u32);
        let packed_rows = tokens * group;
        (0..packed_rows.div_ceil(tile_rows)).map(move |tile| {
            let packed = tile * tile_rows;
            let rows = tile_rows.min(packed_rows - packed);
            let first = position + packed / group;
            let last = position + (packed + rows - 1) / group;
            let key_end = if causal { last + 1 } else { position + tokens };
            let seen = sliding_window.map_or(0, |window| (first + 1).saturating_sub(window));
            let key_begin = seen / UNIT_KEYS * UNIT_KEYS;
            Tile {
                whole: Item {
                    sequence,
                    first_row,
                    position,
                    packed,
                    rows,
                    key_begin,
                    key_end,
                    partial: WHOLE,
                },
                units: (key_end - key_begin).div_ceil(UNIT_KEYS),
                role: Role::Alone,
            }
        })
    }

    /// Puts shared tiles before those of the sequences that share them.
    fn shared(&self, tiles: Vec<Tile>, sequences: &[SequenceSlice]) -> Vec<Tile> {
        let Some(block_tokens) = self.shared_block_tokens else {
            return tiles;
        };
        let mut result = Vec::with_capacity(tiles.len() * 3 / 2);
        let mut rest = &tiles[..];
        while let Some(first) = rest.first() {
            let (count, keys) = self.sharers(rest, sequences, block_tokens);
            let (sharers, others) = rest.split_at(count);
            rest = others;
            if count == 1 {
                result.push(*first);
                continue;
            }
            let whole = Item {
                // Past all of its keys: every row sees them.
                position: keys,
                rows: count as u32 * self.group,
                key_begin: 0,
                key_end: keys,
                ..first.whole
            };
            result.push(Tile {
                whole,
                units: keys / UNIT_KEYS,
                role: Role::Shared,
            });
            result.extend(sharers.iter().zip(0..).map(|(tile, sharer)| Tile {
                whole: Item {
                    key_begin: keys,
                    ..tile.whole
                },
                units: tile.units - keys / UNIT_KEYS,
                role: Role::Rest(sharer * self.group),
            }));
        }
        result
    }

    /// How many of the first tiles share how many keys such that the most are saved; one if it is not worth it.
    fn sharers(&self, tiles: &[Tile], sequences: &[SequenceSlice], block_tokens: u32) -> (usize, u32) {
        let slice = |tile: &Tile| &sequences[tile.whole.sequence as usize];
        let first = slice(&tiles[0]);
        let mut best = (1, 0);
        let mut keys = first.position;
        for (index, tile) in tiles.iter().enumerate().take((SMALL_ROWS / self.group) as usize) {
            let other = slice(tile);
            let follows = tile.whole.sequence == tiles[0].whole.sequence + index as u32;
            if !follows || other.tokens != 1 {
                break;
            }
            let pairs = first.blocks.iter().zip(&other.blocks);
            let same = pairs.take_while(|(a, b)| a == b).count() as u32;
            keys = keys.min(same * block_tokens).min(other.position) / UNIT_KEYS * UNIT_KEYS;
            if keys < SHARED_KEYS_MIN {
                break;
            }
            if index as u64 * u64::from(keys) > (best.0 as u64 - 1) * u64::from(best.1) {
                best = (index + 1, keys);
            }
        }
        best
    }
}

fn slots(blocks: u32, kv_heads: u32) -> u32 {
    (blocks / kv_heads).max(1)
}

/// Gives each slot an equal run of the tiles' units. A run ends with its tile where little of it is left.
fn share(tiles: &[Tile], slots: u32, partial: &mut u32, list: &mut SlotItems, merges: &mut Vec<Merge>) {
    list.items.clear();
    list.begins.clear();
    let mut left: u64 = tiles.iter().map(|t| u64::from(t.units + ITEM_UNITS)).sum();
    let (mut tile, mut done) = (0, 0);
    let mut shared = Merge::default();
    for slot in 0..slots {
        list.begins.push(list.items.len() as u32);
        let is_last = slot + 1 == slots;
        let share = left
            .div_ceil(u64::from(slots - slot))
            .max(u64::from(SLOT_UNITS_MIN)) as u32;
        let slack = share / 8;
        let mut room = share;
        while let Some(&Tile { units, .. }) = tiles.get(tile) {
            let rest = units - done;
            let fits = is_last || rest + ITEM_UNITS <= room + slack;
            if !is_last && room == 0 || !fits && room <= slack + ITEM_UNITS {
                break;
            }
            let taken = if fits { rest } else { room - ITEM_UNITS };
            list.items.push(part(
                &tiles[tile],
                done..done + taken,
                partial,
                &mut shared,
                merges,
            ));
            left = left.saturating_sub(u64::from(taken) + u64::from(if fits { ITEM_UNITS } else { 0 }));
            room = room.saturating_sub(taken + ITEM_UNITS);
            (tile, done) = if fits { (tile + 1, 0) } else { (tile, done + taken) };
        }
    }
    list.begins.push(list.items.len() as u32);
}

/// Some units of a tile. `shared` is where the parts of the last shared tile are.
fn part(
    tile: &Tile,
    units: Range<u32>,
    partial: &mut u32,
    shared: &mut Merge,
    merges: &mut Vec<Merge>,
) -> Item {
    let whole = tile.whole;
    if tile.role == Role::Alone && units == (0..tile.units) {
        return whole;
    }
    let own = Merge {
        first_row: whole.first_row,
        packed: whole.packed,
        rows: whole.rows,
        partial: *partial,
        ..Merge::default()
    };
    match tile.role {
        _ if units.start > 0 => {}
        Role::Alone => merges.push(own),
        Role::Shared => *shared = own,
        Role::Rest(row) => merges.push(Merge {
            shared: shared.partial + row,
            shared_rows: shared.rows,
            shared_parts: shared.parts,
            ..own
        }),
    }
    match merges.last_mut() {
        Some(merge) if tile.role != Role::Shared => merge.parts += 1,
        _ => shared.parts += 1,
    }
    *partial += whole.rows;
    Item {
        key_begin: whole.key_begin + units.start * UNIT_KEYS,
        key_end: whole.key_end.min(whole.key_begin + units.end * UNIT_KEYS),
        partial: own.partial,
        ..whole
    }
}

impl Plan {
    /// The plan's words as the kernels read them, appended to `words`.
    pub fn encode(&self, words: &mut Vec<u32>) {
        let start = words.len();
        let slots = HEADER_WORDS + self.small.begins.len() + self.large.begins.len();
        let large = slots + ITEM_WORDS * self.small.items.len();
        let merges = large + ITEM_WORDS * self.large.items.len();
        words.extend([self.merges.len() as u32, merges as u32, 0, 0]);
        for (list, at) in [(&self.small, slots), (&self.large, large)] {
            words.extend(
                list.begins
                    .iter()
                    .map(|&begin| at as u32 + ITEM_WORDS as u32 * begin),
            );
        }
        for item in self.small.items.iter().chain(&self.large.items) {
            words.extend([item.sequence, item.first_row, item.position, item.packed]);
            words.extend([item.rows, item.key_begin, item.key_end, item.partial]);
        }
        for merge in &self.merges {
            words.extend([merge.first_row, merge.packed, merge.rows, merge.partial]);
            words.extend([merge.parts, merge.shared, merge.shared_rows, merge.shared_parts]);
        }
        debug_assert_eq!(words.len() - start, merges + MERGE_WORDS * self.merges.len());
    }

    /// Word at which the slots of small or of large items begin.
    #[must_use]
    pub const fn slots_at(shape: &PlanShape, is_small: bool) -> u32 {
        HEADER_WORDS as u32 + if is_small { 0 } else { shape.slots[0] + 1 }
    }
}

#[cfg(test)]
mod tests;
