//! The paged KV pool: where a token's keys and values lie, writing them, copying and zeroing blocks. Knows nothing
//! of queries.
//!
//! Per block and layer, keys are `[kv head, group of 16 tokens, pair of elements, 32]` and values
//! `[kv head, pair of tokens, 16 elements, 32]`, each 32 a pair of vectors as `kv_element` lays it, so that one load
//! serves 16 keys, or 16 elements of values. With scales, `[kv head, token]` f32 of the keys and of the values follow.
//! Widths and the tokens of blocks are padded. All layers of a block lie together: a block is copied and zeroed in
//! one go, and a short sequence touches few pages.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contract of Append"
)]

use super::isa::Isa;
use super::kv_element::{KvElement, PAIR};
use super::memory::Memory;
use super::simd::{Kernel, Simd, dispatch_bf16};
use super::weights::LANES;
use crate::device::{DeviceError, KvDtype, KvSpec};
use crate::program::AttentionLayer;
use galerne_core::ids::BlockId;

/// Shape of one layer's part of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvLayer {
    first_byte: usize,
    kv_heads: usize,
    /// Elements per head.
    pub(crate) width: usize,
    /// Elements per head in whole vectors.
    pub(crate) width_padded: usize,
    key_bytes: usize,
    value_bytes: usize,
    scale_bytes: usize,
}

impl KvLayer {
    fn new(layer: &AttentionLayer, slots: usize, dtype: KvDtype, first_byte: usize) -> Self {
        let (element_bytes, scale_bytes) = match dtype {
            KvDtype::Bf16 | KvDtype::F16 => (2, 0),
            KvDtype::F32 => (4, 0),
            KvDtype::Int8 => (1, slots * 4),
            KvDtype::Fp8 => (1, 0),
        };
        let width = layer.head_width as usize;
        let width_padded = width.next_multiple_of(LANES);
        Self {
            first_byte,
            kv_heads: layer.kv_heads as usize,
            width,
            width_padded,
            key_bytes: slots * width.next_multiple_of(2) * element_bytes,
            value_bytes: slots * width_padded * element_bytes,
            scale_bytes,
        }
    }

    fn size_bytes(&self) -> usize {
        self.kv_heads * (self.key_bytes + self.value_bytes + 2 * self.scale_bytes)
    }

    /// Elements from one pair of tokens of the values to the next.
    pub(crate) fn value_stride(&self) -> usize {
        2 * self.width_padded
    }

    /// Elements of a group of 16 keys.
    pub(crate) fn key_group(&self) -> usize {
        self.width.next_multiple_of(2) * LANES
    }
}

/// All layers' keys and values.
#[derive(Debug)]
pub(crate) struct KvPool {
    memory: Memory,
    layers: Vec<KvLayer>,
    block_bytes: usize,
    /// The pool's shape; its dtype is the one in use.
    pub(crate) spec: KvSpec,
}

impl KvPool {
    /// A zeroed pool.
    pub(crate) fn new(layers: &[AttentionLayer], spec: KvSpec) -> Result<Self, DeviceError> {
        let slots = spec.block_tokens.next_multiple_of(LANES);
        let mut block_bytes = 0;
        let mut placed = Vec::with_capacity(layers.len());
        for layer in layers {
            let layer = KvLayer::new(layer, slots, spec.dtype, block_bytes);
            block_bytes += layer.size_bytes();
            placed.push(layer);
        }
        let size_bytes = block_bytes.checked_mul(spec.blocks).ok_or(DeviceError::Memory {
            what: "the KV pool",
            needed_bytes: usize::MAX,
        })?;
        let memory = Memory::zeroed("the KV pool", size_bytes)?;
        Ok(Self {
            memory,
            layers: placed,
            block_bytes,
            spec,
        })
    }

    /// Places of a block: its tokens padded to whole vectors.
    pub(crate) fn block_slots(&self) -> usize {
        self.spec.block_tokens.next_multiple_of(LANES)
    }

    /// A layer's shape.
    pub(crate) fn layer(&self, layer: usize) -> KvLayer {
        self.layers[layer]
    }

    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        self.memory.size_bytes()
    }

    /// Keys of group `group` of a block: `[pair of elements, 32]`.
    #[inline(always)]
    pub(crate) fn keys<T: KvElement>(
        &self,
        layer: &KvLayer,
        block: BlockId,
        head: usize,
        group: usize,
    ) -> *mut T {
        let at = head * layer.key_bytes + group * layer.key_group() * size_of::<T>();
        self.at(layer, block, at).cast()
    }

    /// Values of group `group` of a block: `[pair of tokens, 16 elements, 32]`.
    #[inline(always)]
    pub(crate) fn values<T: KvElement>(
        &self,
        layer: &KvLayer,
        block: BlockId,
        head: usize,
        group: usize,
    ) -> *mut T {
        let at = layer.kv_heads * layer.key_bytes + head * layer.value_bytes;
        let group = group * LANES * layer.width_padded * size_of::<T>();
        self.at(layer, block, at + group).cast()
    }

    /// Scales of the keys and of the values of a group, if there are scales.
    #[inline(always)]
    pub(crate) fn scales(
        &self,
        layer: &KvLayer,
        block: BlockId,
        head: usize,
        group: usize,
    ) -> (*mut f32, *mut f32) {
        let numbers = layer.kv_heads * (layer.key_bytes + layer.value_bytes);
        let at = numbers + head * layer.scale_bytes + group * LANES * 4;
        let keys = self.at(layer, block, at);
        let values = self.at(layer, block, at + layer.kv_heads * layer.scale_bytes);
        (keys.cast(), values.cast())
    }

    #[inline(always)]
    fn at(&self, layer: &KvLayer, block: BlockId, offset: usize) -> *mut u8 {
        let at = block.index() * self.block_bytes + layer.first_byte + offset;
        debug_assert!(at <= self.memory.size_bytes());
        // SAFETY: block ids are checked when a step is submitted, layers and heads come from the program the
        // pool was sized for, so the offset lies within the memory.
        unsafe { self.memory.ptr().add(at) }
    }

    /// Copies a block, all layers.
    ///
    /// # Safety
    /// No step is running on the pool.
    pub(crate) unsafe fn copy_block(&self, from: BlockId, to: BlockId) {
        assert!(from.index() < self.spec.blocks && to.index() < self.spec.blocks && from != to);
        let bytes = self.block_bytes;
        // SAFETY: two different blocks of the pool, in range by the assertion; nobody else is there by contract.
        unsafe {
            let base = self.memory.ptr();
            std::ptr::copy_nonoverlapping(
                base.add(from.index() * bytes),
                base.add(to.index() * bytes),
                bytes,
            );
        }
    }

    /// Zeroes a block, all layers.
    ///
    /// # Safety
    /// No step is running on the pool.
    pub(crate) unsafe fn zero_block(&self, block: BlockId) {
        assert!(block.index() < self.spec.blocks);
        let bytes = self.block_bytes;
        // SAFETY: a block of the pool, in range by the assertion; nobody else is there by contract.
        unsafe { std::ptr::write_bytes(self.memory.ptr().add(block.index() * bytes), 0, bytes) };
    }
}

/// Writes the keys and values of one token, all heads.
///
/// # Safety
/// To run one: the machine has the instruction set; nobody else touches this token's place; `block` is below the
/// pool's number of blocks and `slot` below `block_tokens`; `T` is the pool's element type.
pub(crate) struct Append<'a, T> {
    pub(crate) pool: &'a KvPool,
    pub(crate) layer: KvLayer,
    pub(crate) block: BlockId,
    pub(crate) slot: usize,
    /// `[kv heads * width]`
    pub(crate) k: &'a [f32],
    /// `[kv heads * width]`
    pub(crate) v: &'a [f32],
    pub(crate) element: std::marker::PhantomData<T>,
}

/// Runs an append.
///
/// # Safety
/// See [`Append`].
pub(crate) unsafe fn append<T: KvElement>(isa: Isa, append: Append<'_, T>) {
    assert!(append.block.index() < append.pool.spec.blocks && append.slot < append.pool.spec.block_tokens);
    assert!(append.k.len() == append.v.len() && append.k.len() == append.layer.kv_heads * append.layer.width);
    // The same rounding to bf16 as in attention.
    dispatch_bf16(isa, append);
}

impl<T: KvElement> Kernel for Append<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let layer = &self.layer;
        let (group, lane) = (self.slot / LANES, self.slot % LANES);
        let heads = self
            .k
            .chunks_exact(layer.width)
            .zip(self.v.chunks_exact(layer.width));
        for (head, (k, v)) in heads.enumerate() {
            let keys = self.pool.keys::<T>(layer, self.block, head, group);
            let values = self.pool.values::<T>(layer, self.block, head, group);
            let values = values.add(lane / 2 * layer.value_stride());
            let (key_scale, value_scale) = (scale::<S, T>(k), scale::<S, T>(v));
            if T::SCALED {
                let (keys, values) = self.pool.scales(layer, self.block, head, group);
                (*keys.add(lane), *values.add(lane)) = (key_scale, value_scale);
            }
            for d in (0..layer.width).step_by(LANES) {
                let last = (d + LANES).min(layer.width);
                let rounded = round::<S, T>(&k[d..last], key_scale);
                for (i, &value) in rounded.iter().enumerate().take(last - d) {
                    *keys.add((d + i) / 2 * PAIR + T::place(lane, (d + i) % 2)) = value;
                }
                let rounded = round::<S, T>(&v[d..last], value_scale);
                for (i, &value) in rounded.iter().enumerate().take(last - d) {
                    *values.add(2 * d + T::place(i, lane % 2)) = value;
                }
            }
        }
    }
}

/// What a head's stored numbers are multiplied with: the largest is stored as 127.
#[inline(always)]
unsafe fn scale<S: Simd, T: KvElement>(head: &[f32]) -> f32 {
    if !T::SCALED {
        return 1.0;
    }
    let largest = head.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
    // 0 would be divided by; of numbers so small nothing is left anyway.
    (largest.min(f32::MAX) / 127.0).max(1e-30)
}

/// Up to 16 numbers as stored.
#[inline(always)]
unsafe fn round<S: Simd, T: KvElement>(numbers: &[f32], scale: f32) -> [T; LANES] {
    let mut padded = [0.0; LANES];
    padded[..numbers.len()].copy_from_slice(numbers);
    let mut x = S::load(padded.as_ptr());
    let largest = if T::SCALED {
        x = S::div(x, S::splat(scale));
        127.0
    } else {
        T::LARGEST
    };
    // In this order a NaN becomes a number.
    x = S::min(S::max(x, S::splat(-largest)), S::splat(largest));
    let mut rounded = std::mem::MaybeUninit::<[T; LANES]>::uninit();
    T::store::<S>(rounded.as_mut_ptr().cast(), x);
    // SAFETY: store wrote all 16.
    rounded.assume_init()
}
