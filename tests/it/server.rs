//! The server through its sockets: volumes, sessions, requests, hostile peers, and what survives it.

pub(crate) mod client;
mod hostile;
mod kept;
mod regions;
mod requests;
mod sessions;
mod survival;
mod volumes;
