// The end of one pass through levels.inl.
#undef FS_LEVEL
#undef FS_TARGET
#undef FS_BYTES
#undef FS_INLINE
#undef FS_TO_DOUBLE
#undef FS_TO_FLOAT
#undef FS_HALVES
#undef FS_HALVES_2
#undef FS_BFLOATS
#undef FS_BFLOATS_2
#undef FS_STORE_HALVES
#undef FS_PRODUCT
#undef FS_ROOT
#undef FS_STREAM
#undef FS_STREAMED
