//! Memory that ends at a page nobody may touch.

/// From the first byte to a multiple of this, memory ends at the page.
const ALIGNMENT: usize = 16;

/// Pages of its own, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    first_page: *mut u8,
    size_bytes: usize,
    offset: usize,
}

// SAFETY: it owns its pages and gives out their address only.
unsafe impl Send for Mapping {}

impl Mapping {
    /// `bytes` bytes of `fill`; nothing if there is not so much memory.
    pub(crate) fn new(bytes: usize, fill: u8) -> Option<Self> {
        let page = page_bytes();
        let used = bytes.checked_next_multiple_of(ALIGNMENT)?;
        let pages = used.checked_next_multiple_of(page)?;
        let size_bytes = pages.checked_add(page)?;
        // SAFETY: new pages anywhere.
        let first_page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if first_page == libc::MAP_FAILED {
            return None;
        }
        let mapping = Self {
            first_page: first_page.cast(),
            size_bytes,
            offset: pages - used,
        };
        // SAFETY: the last page and those before it are ours.
        unsafe {
            let guard = mapping.first_page.add(pages);
            assert_eq!(libc::mprotect(guard.cast(), page, libc::PROT_NONE), 0);
            std::ptr::write_bytes(mapping.at(), fill, used);
        }
        Some(mapping)
    }

    /// The first byte, at a multiple of 16.
    pub(crate) fn at(&self) -> *mut u8 {
        // SAFETY: within the pages.
        unsafe { self.first_page.add(self.offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, of this size; nobody uses it any more.
        unsafe { libc::munmap(self.first_page.cast(), self.size_bytes) };
    }
}

fn page_bytes() -> usize {
    // SAFETY: asks for a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("pages have a size")
}
