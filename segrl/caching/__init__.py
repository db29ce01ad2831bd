"""A cache of the features of frozen encoders, and keys of content."""

from segrl.caching.content import ImageKeys, content_key
from segrl.caching.feature_cache import FeatureCache, encoding_batches
from segrl.caching.fingerprint import EncoderFingerprint, feature_key

__all__ = ["EncoderFingerprint", "FeatureCache", "ImageKeys", "content_key", "encoding_batches", "feature_key"]
