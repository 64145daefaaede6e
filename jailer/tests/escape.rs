use crate::harness::runner::tests;
tests! {}
