//! Who waits, and whose turn it is: priorities first, then fairness between users.
//!
//! Every user has an account of the tokens served to it so far. Among waiting sequences of the
//! most urgent priority the user with the least service comes first, then the earliest arrival. A
//! user who was away resumes at the service level of those being served, so absence earns nothing
//! ("virtual token counter"); a user with many requests only delays its own.
//!
//! Not here: whether the next one fits (`admit`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

/// Accounts of absent users that are remembered at most.
const MAX_ABSENT: usize = 1024;

/// A waiting sequence: most urgent first, then earliest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) priority: i32,
    pub(crate) arrival: u64,
    pub(crate) index: u32,
}

#[derive(Debug, Default)]
struct Account {
    name: Option<Box<str>>,
    /// Tokens served.
    service: u64,
    /// Sequences in the scheduler, waiting or running.
    n_sequences: u32,
    waiting: BTreeSet<Place>,
}

/// Waiting sequences and the accounts of their users.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    accounts: Vec<Account>,
    by_name: HashMap<Option<Box<str>>, u32>,
    vacant: Vec<u32>,
    n_absent: usize,
    /// Accounts with waiting sequences.
    with_waiting: BTreeSet<u32>,
    /// Number of waiting sequences by priority.
    priorities: BTreeMap<i32, u32>,
    /// Service level of whoever was served last: where newcomers start.
    level: u64,
    n_waiting: usize,
}

impl Queue {
    /// Opens or finds the account of `user` for one more sequence.
    pub(crate) fn join(&mut self, user: Option<&str>) -> u32 {
        let name: Option<Box<str>> = user.map(Into::into);
        let index = match self.by_name.get(&name) {
            Some(&index) => index,
            None => {
                let index = self.vacant.pop().unwrap_or_else(|| {
                    self.accounts.push(Account::default());
                    self.accounts.len() as u32 - 1
                });
                self.accounts[index as usize].name.clone_from(&name);
                self.by_name.insert(name, index);
                self.n_absent += 1;
                index
            }
        };
        let account = &mut self.accounts[index as usize];
        if account.n_sequences == 0 {
            account.service = account.service.max(self.level);
            self.n_absent -= 1;
        }
        account.n_sequences += 1;
        index
    }

    /// One sequence of the account has ended.
    pub(crate) fn leave(&mut self, account: u32) {
        let of = &mut self.accounts[account as usize];
        of.n_sequences -= 1;
        if of.n_sequences > 0 {
            return;
        }
        self.n_absent += 1;
        // Nothing is lost by forgetting who is not ahead: a newcomer starts at the level anyway.
        if of.service <= self.level {
            self.close(account);
        } else if self.n_absent > MAX_ABSENT {
            for index in 0..self.accounts.len() as u32 {
                let of = &self.accounts[index as usize];
                if of.n_sequences == 0 && self.by_name.get(&of.name) == Some(&index) {
                    self.close(index);
                }
            }
        }
    }

    fn close(&mut self, account: u32) {
        let of = std::mem::take(&mut self.accounts[account as usize]);
        self.by_name.remove(&of.name);
        self.vacant.push(account);
        self.n_absent -= 1;
    }

    pub(crate) fn push(&mut self, account: u32, place: Place) {
        if self.accounts[account as usize].waiting.insert(place) {
            self.with_waiting.insert(account);
            *self.priorities.entry(place.priority).or_insert(0) += 1;
            self.n_waiting += 1;
        }
    }

    pub(crate) fn remove(&mut self, account: u32, place: Place) {
        let waiting = &mut self.accounts[account as usize].waiting;
        if !waiting.remove(&place) {
            return;
        }
        if waiting.is_empty() {
            self.with_waiting.remove(&account);
        }
        self.n_waiting -= 1;
        if let Some(count) = self.priorities.get_mut(&place.priority) {
            *count -= 1;
            if *count == 0 {
                self.priorities.remove(&place.priority);
            }
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.n_waiting
    }

    /// The most urgent priority that waits.
    pub(crate) fn most_urgent(&self) -> Option<i32> {
        self.priorities.first_key_value().map(|(&priority, _)| priority)
    }

    /// The first waiting sequence of one account.
    pub(crate) fn head(&self, account: u32) -> Option<Place> {
        self.accounts[account as usize].waiting.first().copied()
    }

    /// The waiting sequence of the account after `place`.
    pub(crate) fn after(&self, account: u32, place: Place) -> Option<Place> {
        let later = (Bound::Excluded(place), Bound::Unbounded);
        self.accounts[account as usize].waiting.range(later).next().copied()
    }

    /// The first waiting sequence of every account that has one.
    pub(crate) fn heads(&self) -> impl Iterator<Item = (u32, Place)> + '_ {
        self.with_waiting
            .iter()
            .filter_map(|&account| self.head(account).map(|place| (account, place)))
    }

    /// The waiting sequence whose turn it is.
    pub(crate) fn first(&self) -> Option<(u32, Place)> {
        self.heads().min_by_key(|&(account, place)| {
            (place.priority, self.accounts[account as usize].service, place.arrival)
        })
    }

    pub(crate) fn service(&self, account: u32) -> u64 {
        self.accounts[account as usize].service
    }

    pub(crate) fn charge(&mut self, account: u32, tokens: u32) {
        self.accounts[account as usize].service += u64::from(tokens);
    }

    /// Takes back part of a charge: granted tokens that did not run.
    pub(crate) fn refund(&mut self, account: u32, tokens: u32) {
        self.accounts[account as usize].service -= u64::from(tokens);
    }

    /// Notes that the account is being served: newcomers start at its level.
    pub(crate) fn serve(&mut self, account: u32) {
        self.level = self.level.max(self.accounts[account as usize].service);
    }

    #[cfg(test)]
    pub(crate) fn n_accounts(&self) -> usize {
        self.by_name.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(priority: i32, arrival: u64) -> Place {
        Place { priority, arrival, index: arrival as u32 }
    }

    #[test]
    fn urgency_beats_service_and_service_beats_arrival() {
        let mut queue = Queue::default();
        let (busy, calm) = (queue.join(Some("busy")), queue.join(Some("calm")));
        queue.charge(busy, 100);
        queue.push(busy, place(0, 1));
        queue.push(calm, place(0, 2));
        assert_eq!(queue.first(), Some((calm, place(0, 2))));
        queue.push(busy, place(-1, 3));
        assert_eq!(queue.first(), Some((busy, place(-1, 3))));
        assert_eq!(queue.most_urgent(), Some(-1));
        queue.remove(busy, place(-1, 3));
        queue.remove(calm, place(0, 2));
        assert_eq!(queue.first(), Some((busy, place(0, 1))));
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn a_newcomer_starts_level_with_those_being_served() {
        let mut queue = Queue::default();
        let old = queue.join(Some("old"));
        queue.charge(old, 5000);
        queue.serve(old);
        let new = queue.join(Some("new"));
        assert_eq!(queue.service(new), 5000);
    }

    #[test]
    fn leaving_and_coming_back_does_not_clear_what_was_served() {
        let mut queue = Queue::default();
        let other = queue.join(Some("other"));
        let user = queue.join(Some("user"));
        queue.charge(user, 900);
        queue.leave(user);
        queue.serve(other);
        let again = queue.join(Some("user"));
        assert_eq!(queue.service(again), 900);
    }

    #[test]
    fn accounts_of_absent_users_are_bounded() {
        let mut queue = Queue::default();
        for number in 0..3 * MAX_ABSENT {
            let account = queue.join(Some(&number.to_string()));
            queue.charge(account, 1);
            queue.leave(account);
            assert!(queue.n_accounts() <= MAX_ABSENT + 1);
        }
    }
}
