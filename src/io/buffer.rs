//! Page-aligned data buffers: one per tag, in one anonymous mapping that lives as long as the frontend ([`Buffers`]); or single
//! ones that are passed along with a request ([`Buffer`], and the [`BufferPool`] that keeps free ones).
//!
//! Contract: buffers never move and are never freed before the [`Buffers`] is dropped, so an address may be given to the
//! kernel; whoever gave it away drops the `Buffers` only after the operation's completion. A page takes memory when it is
//! first touched, unless [`Buffers::prefault`] was called. A fresh page reads as zeros; a used one keeps what was in it, so
//! whoever sends a buffer sends only what was filled.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// The alignment of every buffer, bytes.
pub const PAGE_BYTES: usize = 4096;

/// `count` buffers of the same size.
#[derive(Debug)]
pub struct Buffers {
    start: NonNull<u8>,
    total: NonZeroUsize,
    each: usize,
    count: usize,
}

// SAFETY: the mapping belongs to this value alone and is not tied to a thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Maps `count` buffers of `bytes_each` bytes, a multiple of [`PAGE_BYTES`]; no page of them takes memory yet.
    pub fn new(count: usize, bytes_each: usize) -> io::Result<Buffers> {
        let total = count.checked_mul(bytes_each).and_then(NonZeroUsize::new);
        let Some(total) = total.filter(|_| bytes_each.is_multiple_of(PAGE_BYTES)) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        };
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of anyone.
        let start = unsafe { mmap_anonymous(None, total, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        let buffers = Buffers { start: start.cast(), total, each: bytes_each, count };
        // A 4 KiB request should cost 4 KiB of a large buffer, not a huge page. Kernels without huge pages refuse this.
        // SAFETY: the range is the mapping made above.
        let _ = unsafe { madvise(start, total.get(), MmapAdvise::MADV_NOHUGEPAGE) };
        Ok(buffers)
    }

    /// Gives every page its memory now, so that no request waits for a page fault.
    pub fn prefault(&mut self) {
        for page in (0..self.total.get()).step_by(PAGE_BYTES) {
            // SAFETY: the byte is inside the mapping, and `&mut self` says that no one else uses it through this value. What
            // the page holds is kept; volatile, so that the touch is not optimised away.
            unsafe {
                let byte = self.start.as_ptr().add(page);
                byte.write_volatile(byte.read_volatile());
            }
        }
    }

    /// How many buffers there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Length of each, bytes.
    pub fn bytes_each(&self) -> usize {
        self.each
    }

    /// The first byte of buffer `index`; panics when there is none such.
    pub fn start(&self, index: usize) -> *mut u8 {
        assert!(index < self.count, "buffer {index} of {}", self.count);
        // SAFETY: `index` is below the count, so the sum stays inside the mapping.
        unsafe { self.start.as_ptr().add(index * self.each) }
    }

    /// The buffer's address `offset` bytes in, for an operation of `len` bytes; panics unless those lie inside the buffer.
    pub fn at(&self, index: usize, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.each && len <= self.each - offset,
            "{len} bytes at {offset} of a {} byte buffer",
            self.each
        );
        // SAFETY: just checked: inside the buffer.
        unsafe { self.start(index).add(offset) }
    }

    /// Copies `bytes` into buffer `index` at `offset`; panics unless they fit. No operation may be using these bytes.
    pub fn copy_in(&mut self, index: usize, offset: usize, bytes: &[u8]) {
        let to = self.at(index, offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is a borrow of other memory, for `&mut self` is held.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies from buffer `index` at `offset` into `bytes`; panics unless the range lies inside the buffer. No operation may
    /// be writing these bytes.
    pub fn copy_out(&self, index: usize, offset: usize, bytes: &mut [u8]) {
        let from = self.at(index, offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is an exclusive borrow and can therefore not be part of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// `len` bytes of buffer `index` at `offset`, to look at; panics unless they lie inside the buffer.
    ///
    /// # Safety
    ///
    /// Until the slice is dropped nothing writes these bytes: neither an operation in flight nor anyone through `start` or `at`.
    pub unsafe fn bytes(&self, index: usize, offset: usize, len: usize) -> &[u8] {
        // SAFETY: `at` checked the range, pages of an anonymous mapping are always initialised, and the caller vouches that
        // nothing writes there.
        unsafe { std::slice::from_raw_parts(self.at(index, offset, len), len) }
    }

    /// Moves the bytes of `range` to the start of buffer `index`; panics unless they lie inside the buffer. No operation may be
    /// using them, or the place they go to.
    pub fn copy_down(&mut self, index: usize, range: std::ops::Range<usize>) {
        if range.start > 0 {
            let from = self.at(index, range.start, range.len());
            // SAFETY: `at` checked the range, the buffer starts before it; `copy` allows the two to overlap.
            unsafe { std::ptr::copy(from, self.start(index), range.len()) }
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, and by the contract no operation uses it any more. Failing would mean that the
        // address is not a mapping, which cannot be.
        let _ = unsafe { munmap(self.start.cast(), self.total.get()) };
    }
}

/// Page-aligned bytes.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a buffer owns its memory alone, like a boxed slice.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Zeroed bytes: at least `bytes`, rounded up to a power of two and at least a page.
    pub fn new(bytes: usize) -> Buffer {
        let bytes = bytes.max(PAGE_BYTES).next_power_of_two();
        let layout = Buffer::layout(bytes);
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Buffer { start, bytes }
    }

    fn layout(bytes: usize) -> Layout {
        match Layout::from_size_align(bytes, PAGE_BYTES) {
            Ok(layout) => layout,
            Err(_) => unreachable!("buffers are bounded by limits"),
        }
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Its first byte, for the kernel.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised and `bytes` long.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and we are borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), Buffer::layout(self.bytes)) }
    }
}

/// Free buffers of one thread, by size.
#[derive(Debug)]
pub struct BufferPool {
    free: RefCell<Free>,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct Free {
    /// Index: the power of two.
    by_size: [Vec<Buffer>; 32],
    bytes: usize,
}

impl BufferPool {
    /// A pool that keeps at most `bytes_max` bytes of free buffers.
    pub fn new(bytes_max: usize) -> BufferPool {
        BufferPool { free: RefCell::default(), bytes_max }
    }

    /// A buffer of at least `bytes`; its content is whatever it was.
    pub fn take(&self, bytes: usize) -> Buffer {
        let bytes = bytes.max(PAGE_BYTES).next_power_of_two();
        let free = &mut *self.free.borrow_mut();
        match free.by_size.get_mut(bytes.trailing_zeros() as usize).and_then(Vec::pop) {
            Some(buffer) => {
                free.bytes -= buffer.len();
                buffer
            }
            None => Buffer::new(bytes),
        }
    }

    /// Gives a buffer back.
    pub fn give(&self, buffer: Buffer) {
        let free = &mut *self.free.borrow_mut();
        let class = buffer.len().trailing_zeros() as usize;
        if free.bytes + buffer.len() <= self.bytes_max && class < free.by_size.len() {
            free.bytes += buffer.len();
            free.by_size[class].push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_apart_and_keep_their_bytes() {
        let mut buffers = Buffers::new(3, 2 * PAGE_BYTES).unwrap();
        for index in 0..3 {
            assert!(buffers.start(index).addr().is_multiple_of(PAGE_BYTES));
            buffers.copy_in(index, 0, &[u8::try_from(index).unwrap() + 1; 2 * PAGE_BYTES]);
        }
        buffers.prefault();
        for index in 0..3 {
            let mut bytes = [0; PAGE_BYTES];
            buffers.copy_out(index, PAGE_BYTES, &mut bytes);
            assert!(bytes.iter().all(|byte| usize::from(*byte) == index + 1));
        }
        assert_eq!((buffers.count(), buffers.bytes_each()), (3, 2 * PAGE_BYTES));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for (count, each) in [(0, PAGE_BYTES), (1, 0), (1, 100), (usize::MAX, PAGE_BYTES)] {
            assert!(Buffers::new(count, each).is_err(), "{count} of {each}");
        }
    }

    #[test]
    #[should_panic(expected = "buffer")]
    fn a_copy_past_the_end_is_caught() {
        Buffers::new(2, PAGE_BYTES).unwrap().copy_in(0, 1, &[0; PAGE_BYTES]);
    }

    #[test]
    fn buffers_are_aligned_and_reused() {
        let pool = BufferPool::new(64 << 10);
        let mut buffer = pool.take(5000);
        assert_eq!(buffer.len(), 8192);
        assert_eq!(buffer.as_ptr() as usize % PAGE_BYTES, 0);
        buffer[8191] = 7;
        let at = buffer.as_ptr();
        pool.give(buffer);
        assert_eq!(pool.take(8192).as_ptr(), at);
        assert_eq!(pool.take(0).len(), PAGE_BYTES);
    }

    #[test]
    fn the_pool_is_bounded() {
        let pool = BufferPool::new(64 << 10);
        let buffers: Vec<_> = (0..32).map(|_| pool.take(4096)).collect();
        buffers.into_iter().for_each(|buffer| pool.give(buffer));
        assert_eq!(pool.free.borrow().bytes, 64 << 10);
    }
}
