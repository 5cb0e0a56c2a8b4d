//! The planner: machine files, costs, search, explanation. No GPU.

// What plans are made for.
mod workloads;
// Machine files.
mod machines;
// The search against every plan there is.
mod search;
// Several pipelines beside each other.
mod teams;
// What is fixed by hand, what does not fit, what is said about a plan.
mod words;
