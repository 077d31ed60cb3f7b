//! Plans of random and of telling steps: every row sees its keys once, slots are even.

use galerne_core::ids::BlockId;
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
        shared_block_tokens: None,
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
    let mut partial_used = vec![false; shape.partial_rows_max(sequences.len())];
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
    let merged: u32 = plan
        .merges
        .iter()
        .map(|m| (m.parts + m.shared_parts) * m.rows)
        .sum();
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
        // Shared items have the rows of several sequences.
        let global = slice.first_token as u32 * shape.group + row;
        let place = |i: &Item| global.checked_sub(i.first_row * shape.group + i.packed);
        let items = plan.small.items.iter().chain(&plan.large.items);
        let mine = items.filter(|&i| place(i).is_some_and(|place| place < i.rows));
        let (mut reached, mut parts) = (None, vec![]);
        for item in mine {
            if item.sequence == index && item.rows <= shape.group * slice.tokens as u32 {
                assert_eq!(item.first_row as usize, slice.first_token);
                assert_eq!(item.position, slice.position);
            } else {
                assert!(
                    item.key_end <= slice.position && item.position >= item.key_end,
                    "{item:?}"
                );
            }
            assert!(
                reached.is_none_or(|end| end == item.key_begin),
                "row {row}: a gap before {item:?}"
            );
            assert!(reached.is_some() || item.key_begin <= begin);
            reached = Some(item.key_end);
            parts.push(if item.partial == WHOLE {
                WHOLE
            } else {
                item.partial + place(item).expect("it is in it")
            });
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
            let (merge, row) = (merge[0], row - merge[0].packed);
            let shared = (0..merge.shared_parts).map(|p| merge.shared + p * merge.shared_rows + row);
            let own = (0..merge.parts).map(|p| merge.partial + p * merge.rows + row);
            assert_eq!(parts, shared.chain(own).collect::<Vec<u32>>());
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
        common in prop::collection::vec(0..160u32, 12),
        share: bool,
    ) {
        let mut sequences = slices(&lengths);
        for (s, slice) in sequences.iter_mut().enumerate() {
            // So many blocks of 16 as all have in common, then the sequence's own.
            let blocks = (slice.position + slice.tokens as u32).div_ceil(16);
            let own = |b| if b < common[s] { b } else { 1_000 * (s as u32 + 1) + b };
            slice.blocks = (0..blocks).map(|b| BlockId(own(b))).collect();
        }
        let tokens: usize = lengths.iter().map(|l| l.1).sum();
        let shape = shape(group, causal, window, slots);
        let shape = if share { shape.with_shared_blocks(16) } else { shape };
        let plan = check(shape, &sequences, tokens + padding);
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
fn a_common_beginning_is_read_once() {
    let mut sequences = slices(&[(1_000, 1), (2_000, 1), (900, 1), (3_000, 1), (1_500, 1)]);
    for (s, slice) in sequences.iter_mut().enumerate() {
        let own = |b| if b < 12 { b } else { 100 * (s as u32 + 1) + b };
        slice.blocks = (0..slice.position / 64 + 1).map(|b| BlockId(own(b))).collect();
    }
    let plan = check(shape(4, true, None, 1).with_shared_blocks(64), &sequences, 5);
    let keys: Vec<_> = plan
        .small
        .items
        .iter()
        .map(|i| (i.rows, i.key_begin, i.key_end))
        .collect();
    // Four sequences of four rows fill a tile.
    let expected = [
        (16, 0, 768),
        (4, 768, 1_001),
        (4, 768, 2_001),
        (4, 768, 901),
        (4, 768, 3_001),
        (4, 0, 1_501),
    ];
    assert_eq!(keys, expected);
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
