//! Behaviour of the wire types: what is accepted, what is refused and how, and what goes out.

mod bad_requests;
mod bodies;
mod good_requests;
mod responses;
mod schemas;
