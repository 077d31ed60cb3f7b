//! Where a layer's keys and values lie in device memory, as kernels see it: `KvLayer` in `galerne.cuh`.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::DevicePtr;
use crate::device::KvDtype;
use crate::program::AttentionLayer;

/// How keys and values are stored: `KvDtype` in `galerne.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvElement {
    /// 32 bits.
    F32,
    /// 16 bits with f32's range.
    Bf16,
    /// 16 bits, more exact.
    F16,
    /// 8 bits with an f32 scale per token and head, for keys and for values.
    Int8,
    /// 8 bits, e4m3.
    Fp8,
}

impl From<KvDtype> for KvElement {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32,
            KvDtype::Bf16 => Self::Bf16,
            KvDtype::F16 => Self::F16,
            KvDtype::Int8 => Self::Int8,
            KvDtype::Fp8 => Self::Fp8,
        }
    }
}

impl KvElement {
    /// Bytes of one number.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Int8 | Self::Fp8 => 1,
        }
    }

    /// All, in the order of their numbers on the device.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::F16, Self::Int8, Self::Fp8];
}

/// One layer's part of the KV pool. `galerne.cuh` says how a block is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct KvLayer {
    /// The layer's part of block 0.
    pub bytes: DevicePtr,
    /// Bytes from one block to the next.
    pub block_bytes: u64,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_width: u32,
    dtype: u32,
}

impl KvLayer {
    /// A layer's part of a pool whose blocks are `block_bytes` apart.
    #[must_use]
    pub const fn new(
        bytes: DevicePtr,
        block_bytes: u64,
        layer: &AttentionLayer,
        block_tokens: u32,
        element: KvElement,
    ) -> Self {
        Self {
            bytes,
            block_bytes,
            block_tokens,
            kv_heads: layer.kv_heads,
            head_width: layer.head_width,
            dtype: element as u32,
        }
    }

    /// How its numbers are stored.
    #[must_use]
    pub const fn element(&self) -> KvElement {
        KvElement::ALL[self.dtype as usize]
    }

    /// Bytes the layer takes of a block, a multiple of 16.
    #[must_use]
    pub const fn bytes_per_block(layer: &AttentionLayer, block_tokens: u32, element: KvElement) -> usize {
        let rows = 2 * layer.kv_heads as usize * block_tokens as usize;
        let codes = (rows * layer.head_width as usize * element.bytes()).next_multiple_of(16);
        match element {
            KvElement::Int8 => codes + (rows * 4).next_multiple_of(16),
            _ => codes,
        }
    }
}
