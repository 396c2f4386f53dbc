//! Cutting responses at their first stop token.

use rlhf_core::FinishReason;

/// Cuts `response` after its first token of `stop_token_ids`, which is kept, and says whether
/// there was one. For responses that were sampled without stopping.
pub fn truncate_after_stop(response: &mut Vec<i64>, stop_token_ids: &[i64]) -> FinishReason {
    match response.iter().position(|id| stop_token_ids.contains(id)) {
        Some(stop) => {
            response.truncate(stop + 1);
            FinishReason::Stop
        }
        None => FinishReason::Length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stop_token_is_the_last_token() {
        let mut response = vec![5, 0, 6, 0];
        assert_eq!(
            truncate_after_stop(&mut response, &[9, 0]),
            FinishReason::Stop
        );
        assert_eq!(response, [5, 0]);
        assert_eq!(
            truncate_after_stop(&mut response, &[9]),
            FinishReason::Length
        );
        assert_eq!(response, [5, 0]);
    }
}
