"""Graph hypernetworks: from the computational graph of a model to all of its weights in one pass.

`features` turns a traced graph into numbers, `encoder` passes messages over it, `plan` lists what has to be decoded,
`decoder` turns node embeddings into weights of any size, `writing` puts them where they belong with the noise of each
member, `ghn` is the generator that ties them.
"""
