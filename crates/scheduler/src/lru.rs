//! A list of small numbers, oldest first, with constant-time moves and no allocation after `new`.
//!
//! Not here: what the numbers are. `blocks` keeps idle KV blocks in one, `snapshots` idle snapshots.

/// A doubly linked list over the numbers `0..capacity`, each in it at most once.
#[derive(Debug)]
pub(crate) struct LruList {
    /// `next[i]` is the number after `i`; entry `capacity` is the list's head and tail in one.
    next: Vec<u32>,
    previous: Vec<u32>,
    len: u32,
}

impl LruList {
    pub(crate) fn new(capacity: u32) -> Self {
        // A number that is not in the list points to itself.
        let unlinked: Vec<u32> = (0..=capacity).collect();
        Self { next: unlinked.clone(), previous: unlinked, len: 0 }
    }

    fn head(&self) -> u32 {
        self.next.len() as u32 - 1
    }

    pub(crate) const fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn contains(&self, number: u32) -> bool {
        self.next[number as usize] != number
    }

    pub(crate) fn oldest(&self) -> Option<u32> {
        let first = self.next[self.head() as usize];
        (first != self.head()).then_some(first)
    }

    /// Appends a number that is not in the list.
    pub(crate) fn push_newest(&mut self, number: u32) {
        debug_assert!(!self.contains(number), "{number} is in the list already");
        let head = self.head();
        let last = self.previous[head as usize];
        self.next[last as usize] = number;
        self.previous[number as usize] = last;
        self.next[number as usize] = head;
        self.previous[head as usize] = number;
        self.len += 1;
    }

    /// Takes a number out; does nothing if it is not in the list.
    pub(crate) fn remove(&mut self, number: u32) {
        if !self.contains(number) {
            return;
        }
        let (before, after) = (self.previous[number as usize], self.next[number as usize]);
        self.next[before as usize] = after;
        self.previous[after as usize] = before;
        self.next[number as usize] = number;
        self.previous[number as usize] = number;
        self.len -= 1;
    }

    pub(crate) fn pop_oldest(&mut self) -> Option<u32> {
        let oldest = self.oldest()?;
        self.remove(oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_leave_in_the_order_they_came_unless_removed() {
        let mut list = LruList::new(4);
        for number in [2, 0, 3] {
            list.push_newest(number);
        }
        list.remove(0);
        list.remove(1);
        list.push_newest(0);
        assert_eq!(list.len(), 3);
        let order: Vec<u32> = std::iter::from_fn(|| list.pop_oldest()).collect();
        assert_eq!(order, [2, 3, 0]);
        assert!(!list.contains(2));
    }
}
