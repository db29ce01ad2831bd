"""A cache of the features of frozen encoders, and keys of content."""

from segrl.caching.content import ImageKeys, content_key
from segrl.caching.feature_cache import FeatureCache
from segrl.caching.fingerprint import EncoderFingerprint, feature_key

__all__ = ["EncoderFingerprint", "FeatureCache", "ImageKeys", "content_key", "feature_key"]
