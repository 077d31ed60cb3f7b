//! Who computes which part of a step's attention: pure arithmetic over the sequences' lengths, knows no device.
//!
//! The rows of one sequence are (token, query head of the group) pairs, token by token: packed row `t * group + h`. They are
//! cut into tiles, small ones of 16 rows where all fit in one (decode), else large ones. The keys that a tile sees are cut
//! into units of [`UNIT_KEYS`]. As many blocks run at once as the device holds, the *slots*, for each KV head alike; each
//! gets an equal run of all tiles' units, so that nobody waits for a longest block, and one captured launch serves
//! every step. A tile whose units fall to several slots leaves partial results that `attention_merge` joins.
//!
//! On the device a plan is a list of u32 words:
//! `[merges, first merge's word, 0, 0]`, `[slots + 1]` words where each slot's small items begin, the same for large ones, then
//! items ([`Item`], 8 words each) and merges ([`Merge`], 8 words each).

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
        let tiles = sequences_max + step_tokens_max * self.group as usize / self.large_rows as usize;
        PlanCapacity {
            words: HEADER_WORDS + small + large + 2 + ITEM_WORDS * (tiles + cuts) + MERGE_WORDS * (cuts + 1),
            partial_floats: self.partial_rows_max() * self.kv_heads as usize * (self.head_width as usize + 1),
        }
    }

    /// Rows of partial results at most, for each KV head.
    #[must_use]
    pub const fn partial_rows_max(&self) -> usize {
        2 * ((self.slots[0] - 1) * SMALL_ROWS + (self.slots[1] - 1) * self.large_rows) as usize
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
            }
        })
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
    for slot in 0..slots {
        list.begins.push(list.items.len() as u32);
        let is_last = slot + 1 == slots;
        let share = left
            .div_ceil(u64::from(slots - slot))
            .max(u64::from(SLOT_UNITS_MIN)) as u32;
        let slack = share / 8;
        let mut room = share;
        while let Some(&Tile { whole, units }) = tiles.get(tile) {
            let rest = units - done;
            let fits = is_last || rest + ITEM_UNITS <= room + slack;
            if !is_last && room == 0 || !fits && room <= slack + ITEM_UNITS {
                break;
            }
            let taken = if fits { rest } else { room - ITEM_UNITS };
            list.items.push(part(whole, done, taken, fits, partial, merges));
            left = left.saturating_sub(u64::from(taken) + u64::from(if fits { ITEM_UNITS } else { 0 }));
            room = room.saturating_sub(taken + ITEM_UNITS);
            (tile, done) = if fits { (tile + 1, 0) } else { (tile, done + taken) };
        }
    }
    list.begins.push(list.items.len() as u32);
}

/// `taken` units of a tile of which `done` are given away; the last part if `ends`.
fn part(whole: Item, done: u32, taken: u32, ends: bool, partial: &mut u32, merges: &mut Vec<Merge>) -> Item {
    if done == 0 && ends {
        return whole;
    }
    let key_begin = whole.key_begin + done * UNIT_KEYS;
    let item = Item {
        key_begin,
        key_end: whole.key_end.min(key_begin + taken * UNIT_KEYS),
        partial: *partial,
        ..whole
    };
    if done == 0 {
        merges.push(Merge {
            first_row: whole.first_row,
            packed: whole.packed,
            rows: whole.rows,
            partial: *partial,
            parts: 0,
        });
    }
    if let Some(merge) = merges.last_mut() {
        merge.parts += 1;
    }
    *partial += whole.rows;
    item
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
            words.extend([merge.parts, 0, 0, 0]);
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slices(lengths: &[(u32, usize)]) -> Vec<SequenceSlice> {
        let mut first_token = 0;
        let slice = |&(position, tokens): &(u32, usize)| {
            first_token += tokens;
            SequenceSlice {
                first_token: first_token - tokens,
                tokens,
                position,
                blocks: vec![],
            }
        };
        lengths.iter().map(slice).collect()
    }

    fn shape(group: u32, causal: bool, sliding_window: Option<u32>, slots: u32) -> PlanShape {
        PlanShape {
            group,
            kv_heads: 2,
            head_width: 64,
            causal,
            sliding_window,
            large_rows: LARGE_ROWS[slots as usize % 2],
            slots: [slots, slots.div_ceil(2)],
        }
    }

    /// Every packed row's keys by item, checked to be whole, in order and within bounds.
    fn check(shape: PlanShape, sequences: &[SequenceSlice], rows: usize) -> Plan {
        let mut plan = Plan::default();
        shape.plan(sequences, rows, &mut plan);
        let tokens: usize = sequences.iter().map(|s| s.tokens).sum();
        let mut words = vec![7];
        plan.encode(&mut words);
        let capacity = shape.capacity(tokens, sequences.len());
        assert!(
            words.len() - 1 <= capacity.words,
            "{} words, {capacity:?}",
            words.len() - 1
        );
        let mut partial_used = vec![false; shape.partial_rows_max()];
        for (list, tile_rows, slots) in [
            (&plan.small, SMALL_ROWS, shape.slots[0]),
            (&plan.large, shape.large_rows, shape.slots[1]),
        ] {
            let slots = slots as usize;
            assert_eq!(list.begins.len(), slots + 1);
            assert!(list.begins.is_sorted() && list.begins[slots] as usize == list.items.len());
            for item in &list.items {
                assert!(
                    item.rows > 0 && item.rows <= tile_rows && item.key_begin < item.key_end,
                    "{item:?}"
                );
                assert_eq!(item.key_begin % UNIT_KEYS, 0);
                if item.partial != WHOLE {
                    let used = &mut partial_used[item.partial as usize..][..item.rows as usize];
                    assert!(
                        used.iter().all(|used| !used),
                        "{item:?} overlaps another's partial result"
                    );
                    used.fill(true);
                }
            }
        }
        for (index, slice) in sequences.iter().enumerate() {
            check_sequence(shape, &plan, index as u32, slice);
        }
        let merged: u32 = plan.merges.iter().map(|m| m.parts * m.rows).sum();
        assert_eq!(merged as usize, partial_used.iter().filter(|used| **used).count());
        plan
    }

    fn check_sequence(shape: PlanShape, plan: &Plan, index: u32, slice: &SequenceSlice) {
        for row in 0..slice.tokens as u32 * shape.group {
            let at = slice.position + row / shape.group;
            let end = if shape.causal {
                at + 1
            } else {
                slice.position + slice.tokens as u32
            };
            let begin = shape.sliding_window.map_or(0, |w| (at + 1).saturating_sub(w));
            let items = plan.small.items.iter().chain(&plan.large.items);
            let mine = items.filter(|i| i.sequence == index && (i.packed..i.packed + i.rows).contains(&row));
            let mut reached = None;
            let mut parts = vec![];
            for item in mine {
                assert_eq!(
                    (item.first_row as usize, item.position),
                    (slice.first_token, slice.position)
                );
                assert!(
                    reached.is_none_or(|end| end == item.key_begin),
                    "row {row}: a gap before {item:?}"
                );
                assert!(reached.is_some() || item.key_begin <= begin);
                reached = Some(item.key_end);
                parts.push(item.partial);
            }
            assert!(
                reached.is_some_and(|reached| reached >= end),
                "row {row} misses keys: {reached:?} < {end}"
            );
            if parts != [WHOLE] {
                let holds = |m: &&Merge| {
                    m.first_row as usize == slice.first_token && (m.packed..m.packed + m.rows).contains(&row)
                };
                let merge: Vec<_> = plan.merges.iter().filter(holds).collect();
                assert_eq!(merge.len(), 1, "row {row}");
                let expected: Vec<u32> = (0..merge[0].parts)
                    .map(|p| merge[0].partial + p * merge[0].rows)
                    .collect();
                assert_eq!(parts, expected);
            }
        }
    }

    proptest! {
        #[test]
        fn every_row_sees_its_keys_once(
            lengths in prop::collection::vec((prop_oneof![0..40u32, 0..3_000u32], prop_oneof![Just(1usize), 1..20usize, 1..200usize]), 0..12),
            group in 1..20u32,
            causal: bool,
            window in prop::option::of(1..400u32),
            slots in 1..40u32,
            padding in 0..5usize,
        ) {
            let sequences = slices(&lengths);
            let tokens: usize = lengths.iter().map(|l| l.1).sum();
            let plan = check(shape(group, causal, window, slots), &sequences, tokens + padding);
            let zeroed: u32 = plan.merges.iter().filter(|m| m.parts == 0).map(|m| m.rows).sum();
            prop_assert_eq!(zeroed, padding as u32 * group);
        }
    }

    fn loads(list: &SlotItems) -> Vec<u32> {
        let units = |item: &Item| (item.key_end - item.key_begin).div_ceil(UNIT_KEYS) + ITEM_UNITS;
        let slot = |w: &[u32]| list.items[w[0] as usize..w[1] as usize].iter().map(units).sum();
        list.begins.windows(2).map(slot).collect()
    }

    #[test]
    fn a_long_sequence_is_spread_over_all_slots() {
        let plan = check(shape(4, true, None, 33), &slices(&[(32_767, 1)]), 1);
        let loads = loads(&plan.small);
        assert_eq!(plan.merges.len(), 1);
        assert!(loads.iter().all(|&load| (10..=18).contains(&load)), "{loads:?}");
    }

    #[test]
    fn slots_are_evenly_loaded() {
        for count in [30, 33, 40, 64, 65, 200] {
            let lengths: Vec<_> = (0..count).map(|i| (1_000 + 97 * (i % 31), 1)).collect();
            let loads = loads(&check(shape(4, true, None, 33), &slices(&lengths), count as usize).small);
            let (most, all) = (loads.iter().max().unwrap(), loads.iter().sum::<u32>());
            assert!(
                f64::from(*most) <= 1.2 * f64::from(all) / 33.0 + 1.0,
                "{count}: {loads:?}"
            );
        }
    }

    #[test]
    fn short_contexts_are_not_cut() {
        let plan = check(
            shape(4, true, None, 33),
            &slices(&[(100, 1), (20, 1), (127, 1)]),
            4,
        );
        assert_eq!(plan.small.items.len(), 3);
        assert_eq!(plan.merges.len(), 1, "only padding");
    }
}
