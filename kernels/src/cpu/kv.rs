//! The paged KV pool: where a token's keys and values lie, copying and zeroing blocks. Knows nothing of queries.
//!
//! Per block and layer, keys are `[kv head, group of 16 tokens, width, 16]`, so that one load gives one element
//! of 16 keys; values are `[kv head, token, width]`, so that one load gives 16 elements of one value. Widths of
//! values and tokens of blocks are padded to 16. All layers of a block lie together: a block is copied and zeroed
//! in one go, and a short sequence touches few pages.

use galerne_core::ids::BlockId;
use half::f16;

use super::memory::Memory;
use super::simd::Simd;
use super::weights::LANES;
use crate::device::{DeviceError, KvSpec, Precision};
use crate::program::AttentionLayer;

/// How an element of the pool is stored.
pub(crate) trait KvElement: Copy + Default + Send + Sync + 'static {
    /// Rounds to nearest.
    fn from_f32(value: f32) -> Self;

    /// # Safety
    /// 16 elements at `from`; the machine has `S`.
    unsafe fn load<S: Simd>(from: *const Self) -> S::F;
}

impl KvElement for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F {
        // SAFETY: by contract.
        unsafe { S::load(from) }
    }
}

impl KvElement for u16 {
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value).to_bits()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F {
        // SAFETY: by contract.
        unsafe { S::load_f16(from) }
    }
}

/// Shape of one layer's part, in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvLayer {
    first: usize,
    kv_heads: usize,
    /// Elements per head.
    pub(crate) width: usize,
    /// Elements per value row.
    pub(crate) width_padded: usize,
    head_keys: usize,
    head_values: usize,
}

/// All layers' keys and values.
#[derive(Debug)]
pub(crate) struct KvPool {
    memory: Memory,
    layers: Vec<KvLayer>,
    /// Elements of a block, all layers.
    block_elements: usize,
    /// The pool's shape.
    pub(crate) spec: KvSpec,
    element_bytes: usize,
}

impl KvPool {
    /// A zeroed pool.
    pub(crate) fn new(
        layers: &[AttentionLayer],
        spec: KvSpec,
        precision: Precision,
    ) -> Result<Self, DeviceError> {
        let element_bytes = match precision {
            Precision::Auto => 2,
            Precision::F32 => 4,
        };
        let mut block_elements = 0;
        let mut placed = Vec::with_capacity(layers.len());
        for layer in layers {
            let (width, kv_heads) = (layer.head_width as usize, layer.kv_heads as usize);
            let width_padded = width.next_multiple_of(LANES);
            let tokens = spec.block_tokens.next_multiple_of(LANES);
            let (head_keys, head_values) = (tokens * width, spec.block_tokens * width_padded);
            let first = block_elements;
            placed.push(KvLayer {
                first,
                kv_heads,
                width,
                width_padded,
                head_keys,
                head_values,
            });
            block_elements += kv_heads * (head_keys + head_values);
        }
        let size_bytes = block_elements
            .checked_mul(spec.blocks)
            .and_then(|elements| elements.checked_mul(element_bytes))
            .ok_or(DeviceError::Memory {
                what: "the KV pool",
                needed_bytes: usize::MAX,
            })?;
        let memory = Memory::zeroed("the KV pool", size_bytes)?;
        Ok(Self {
            memory,
            layers: placed,
            block_elements,
            spec,
            element_bytes,
        })
    }

    /// Slots a block takes in a row of scores: its tokens padded to whole vectors.
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

    /// Keys of group `group` of a block: `[width, 16]`.
    #[inline(always)]
    pub(crate) fn keys<T: KvElement>(
        &self,
        layer: &KvLayer,
        block: BlockId,
        head: usize,
        group: usize,
    ) -> *mut T {
        let at = layer.first + block.index() * self.block_elements + head * layer.head_keys;
        self.element(at + group * layer.width * LANES)
    }

    /// Values of a block: `[token, width_padded]`.
    #[inline(always)]
    pub(crate) fn values<T: KvElement>(&self, layer: &KvLayer, block: BlockId, head: usize) -> *mut T {
        let at = layer.first + block.index() * self.block_elements;
        self.element(at + layer.kv_heads * layer.head_keys + head * layer.head_values)
    }

    #[inline(always)]
    fn element<T: KvElement>(&self, at: usize) -> *mut T {
        debug_assert!(
            size_of::<T>() == self.element_bytes && at * size_of::<T>() <= self.memory.size_bytes()
        );
        // SAFETY: block ids are checked when a step is submitted, layers and heads come from the program the
        // pool was sized for, so the offset lies within the memory.
        unsafe { self.memory.ptr().cast::<T>().add(at) }
    }

    /// Writes the keys and values of one token, all heads.
    ///
    /// # Safety
    /// Nobody else touches this token's place; `block` is below the pool's number of blocks and `slot` below
    /// `block_tokens`; `T` is the pool's element type.
    pub(crate) unsafe fn append<T: KvElement>(
        &self,
        layer: usize,
        block: BlockId,
        slot: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let layer = &self.layers[layer];
        debug_assert!(block.index() < self.spec.blocks && slot < self.spec.block_tokens);
        let heads = k.chunks_exact(layer.width).zip(v.chunks_exact(layer.width));
        for (head, (k, v)) in heads.enumerate() {
            let keys = self.keys::<T>(layer, block, head, slot / LANES);
            let values = self.values::<T>(layer, block, head);
            for (d, (&k, &v)) in k.iter().zip(v).enumerate() {
                // SAFETY: element d of 16-token group and of the value row, both within the block; exclusive
                // by contract.
                unsafe {
                    *keys.add(d * LANES + slot % LANES) = T::from_f32(k);
                    *values.add(slot * layer.width_padded + d) = T::from_f32(v);
                }
            }
        }
    }

    /// Copies a block, all layers.
    ///
    /// # Safety
    /// No step is running on the pool.
    pub(crate) unsafe fn copy_block(&self, from: BlockId, to: BlockId) {
        assert!(from.index() < self.spec.blocks && to.index() < self.spec.blocks && from != to);
        let bytes = self.block_elements * self.element_bytes;
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
        let bytes = self.block_elements * self.element_bytes;
        // SAFETY: a block of the pool, in range by the assertion; nobody else is there by contract.
        unsafe { std::ptr::write_bytes(self.memory.ptr().add(block.index() * bytes), 0, bytes) };
    }
}
