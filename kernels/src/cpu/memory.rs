//! Plain memory that workers share: zeroed, aligned to cache lines, on huge pages where the system gives them.
//! Knows no layout.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::device::DeviceError;

/// From this size on memory is mapped, on huge pages if the system gives them.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Bytes of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// A zeroed allocation. Whoever reads or writes through [`Memory::ptr`] answers for the absence of races.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: Memory is only an address and a size; access goes through raw pointers under their users' contracts.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory of `size_bytes`, plus a margin of one cache line so that a 64-byte load may start anywhere.
    /// Large memory is mapped and so takes pages only when they are touched.
    pub(crate) fn zeroed(what: &'static str, size_bytes: usize) -> Result<Self, DeviceError> {
        let refused = || DeviceError::Memory {
            what,
            needed_bytes: size_bytes,
        };
        let padded = size_bytes.checked_add(LINE_BYTES).ok_or_else(refused)?;
        let layout = Layout::from_size_align(padded, LINE_BYTES).map_err(|_| refused())?;
        let base = if is_mapped(layout) {
            map(layout.size())
        } else {
            // SAFETY: the layout's size is at least LINE_BYTES, so not zero.
            NonNull::new(unsafe { alloc_zeroed(layout) })
        };
        Ok(Self {
            base: base.ok_or_else(refused)?,
            layout,
        })
    }

    /// The first byte.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The first f32.
    pub(crate) fn f32s(&self) -> *mut f32 {
        self.base.as_ptr().cast()
    }

    /// Bytes asked for.
    pub(crate) fn size_bytes(&self) -> usize {
        self.layout.size() - LINE_BYTES
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if is_mapped(self.layout) {
            unmap(self.base, self.layout.size());
        } else {
            // SAFETY: allocated in `zeroed` with this layout, freed once.
            unsafe { dealloc(self.base.as_ptr(), self.layout) };
        }
    }
}

/// Bytes an arena maps at once; only what is touched takes memory.
const CHUNK_BYTES: usize = 64 << 20;

/// Many pieces in few mappings: pieces smaller than a huge page would each lie on small pages, which costs half of the
/// bandwidth of reading them.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<Memory>>,
    taken: usize,
}

/// A part of an arena's memory.
#[derive(Debug)]
pub(crate) struct Piece {
    memory: Arc<Memory>,
    start: usize,
    size_bytes: usize,
}

impl Arena {
    /// The next `size_bytes`, zeroed, aligned to cache lines, and with a margin like that of [`Memory::zeroed`].
    pub(crate) fn take(&mut self, what: &'static str, size_bytes: usize) -> Result<Piece, DeviceError> {
        let room = size_bytes.next_multiple_of(LINE_BYTES) + LINE_BYTES;
        let fits = |chunk: &&Arc<Memory>| self.taken + room <= chunk.size_bytes();
        let memory = match self.chunk.as_ref().filter(fits) {
            Some(chunk) => Arc::clone(chunk),
            None => {
                self.taken = 0;
                let chunk = Arc::new(Memory::zeroed(what, room.max(CHUNK_BYTES))?);
                Arc::clone(self.chunk.insert(chunk))
            }
        };
        let start = self.taken;
        self.taken += room;
        Ok(Piece {
            memory,
            start,
            size_bytes,
        })
    }
}

impl Piece {
    /// The first byte.
    #[inline(always)]
    pub(crate) fn ptr(&self) -> *mut u8 {
        // SAFETY: an arena hands out starts inside its chunk.
        unsafe { self.memory.ptr().add(self.start) }
    }

    /// Bytes asked for.
    pub(crate) fn size_bytes(&self) -> usize {
        self.size_bytes
    }
}

fn is_mapped(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.size() >= HUGE_PAGE_BYTES
}

#[cfg(target_os = "linux")]
fn map(size_bytes: usize) -> Option<NonNull<u8>> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a new private anonymous mapping; nothing existing is touched.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), size_bytes, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the range was just mapped; the advice changes page sizes, not contents. A refusal only costs
    // speed, so the result is of no interest.
    unsafe { libc::madvise(base, size_bytes, libc::MADV_HUGEPAGE) };
    NonNull::new(base.cast())
}

#[cfg(target_os = "linux")]
fn unmap(base: NonNull<u8>, size_bytes: usize) {
    // SAFETY: mapped in `map` with this size, unmapped once.
    unsafe { libc::munmap(base.as_ptr().cast(), size_bytes) };
}

#[cfg(not(target_os = "linux"))]
fn map(_size_bytes: usize) -> Option<NonNull<u8>> {
    None
}

#[cfg(not(target_os = "linux"))]
fn unmap(_base: NonNull<u8>, _size_bytes: usize) {}

/// Gives heap memory that was freed back to the system. The C library of most Linux systems would keep tens of megabytes
/// of what compiling guests and parsing a tokenizer took; elsewhere this does nothing.
pub fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: safe from any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Rows of f32 somewhere in shared memory: a resolved view.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rect {
    /// First element of the first row.
    pub(crate) base: *mut f32,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Elements per row.
    pub(crate) width: usize,
    /// Rows.
    pub(crate) rows: usize,
}

impl Rect {
    /// Row `r` to read.
    ///
    /// # Safety
    /// Nobody writes the row while the slice lives.
    pub(crate) unsafe fn row<'a>(self, r: usize) -> &'a [f32] {
        assert!(r < self.rows);
        // SAFETY: a Rect describes rows inside a live Memory; the row is in range; no writer by contract.
        unsafe { std::slice::from_raw_parts(self.base.add(r * self.stride), self.width) }
    }

    /// Row `r` to write.
    ///
    /// # Safety
    /// Nobody else reads or writes the row while the slice lives.
    pub(crate) unsafe fn row_mut<'a>(self, r: usize) -> &'a mut [f32] {
        assert!(r < self.rows);
        // SAFETY: as in `row`, and exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(r * self.stride), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_apart() {
        let mut arena = Arena::default();
        let pieces: Vec<Piece> = [100, 1, CHUNK_BYTES, 4_096, 63]
            .into_iter()
            .map(|size| arena.take("a test", size).unwrap())
            .collect();
        for (i, piece) in pieces.iter().enumerate() {
            let (start, end) = (piece.ptr() as usize, piece.ptr() as usize + piece.size_bytes());
            assert!(start.is_multiple_of(LINE_BYTES));
            for other in &pieces[i + 1..] {
                let (from, to) = (other.ptr() as usize, other.ptr() as usize + other.size_bytes());
                assert!(end + LINE_BYTES <= from || to + LINE_BYTES <= start);
            }
        }
    }
}
