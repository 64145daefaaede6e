//! A machine steered by HTTP over a Unix socket, in Firecracker's interface and with more beside it.
//!
//! Two processes: `http` has the clients and is confined, with `route` and `model` to make typed requests of what they say;
//! the other has the machine. There the `desk` decides what may be said when, and with `config`, `log` and `metrics` keeps
//! what was said and done; the `instance` carries it out.

pub mod call;
pub mod config;
pub mod desk;
pub mod http;
pub mod instance;
pub mod log;
pub mod metrics;
pub mod model;
pub mod route;
pub mod snapshot;
pub mod socket;
