"""Secure aggregation: the server learns the sum of what clients send, and nothing of any alone.

::

    advertise   client: two X25519 key pairs                   --> public keys
    share       public keys of all  --> Shamir shares of the mask key and of a seed, one a peer,
                                        sealed for it          --> sealed shares
    mask        sealed shares       --> x + PRG(seed) + sum of +-PRG(key agreed with a peer)
                                                               --> uniformly random numbers
    unmask      who is in the sum   --> seed shares of those who are in it, key shares of those
                                        who fell out           --> the server removes the masks

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
figure 4 without the parts for active servers (no signatures, no consistency check). Knows no Flower
and no codec: whole numbers in, whole numbers out.
"""
