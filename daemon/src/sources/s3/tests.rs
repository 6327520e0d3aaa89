//! S3 against a real server.
